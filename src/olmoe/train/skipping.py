"""Skipped steps: those whose loss or gradient norm is not a number or far above the recent ones.

One bad batch, or a bit that a machine flipped, would otherwise spoil moments and weights for hundreds of steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from olmoe.errors import ConfigError
from olmoe.runtime import log
from olmoe.train.config import SkipConfig


def is_skipped(config: SkipConfig, losses: Sequence[float], norms: Sequence[float], loss: float, norm: float) -> bool:
    """Whether to skip a step that follows steps with these losses and gradient norms.

    Beyond `sigmas` standard deviations above the mean of either, once half a window of steps is known.
    """
    if config.sigmas == 0 or len(losses) < max(2, config.window // 2):
        return False
    return _is_beyond(config.sigmas, losses, loss) or _is_beyond(config.sigmas, norms, norm)


def _is_beyond(sigmas: float, last: Sequence[float], value: float) -> bool:
    mean = statistics.fmean(last)
    # The mean of equal values may be rounded to just below them.
    return not (value <= mean + sigmas * statistics.pstdev(last) or math.isclose(value, mean))  # true of nan


class StepFilter:
    """Decides about each step of a run from the ones before it; checkpoints keep `recent`.

    Only steps that were taken count as known, so that a spike does not hide the next one.
    """

    def __init__(self, config: SkipConfig, recent: list[list[float]]) -> None:
        """`recent` are pairs of loss and gradient norm; they are added to in place."""
        self.config, self.recent = config, recent
        self.skipped_in_a_row = 0

    def admits(self, loss: float, norm: float, step: int) -> bool:
        """Whether the step may change weights; remembers it if so.

        Raises `ConfigError` after `limit` steps in a row that may not.
        """
        losses, norms = ([pair[i] for pair in self.recent] for i in (0, 1))
        if is_skipped(self.config, losses, norms, loss, norm):
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > self.config.limit:
                raise ConfigError(
                    f"{self.skipped_in_a_row} steps in a row had to be skipped, up to step {step} (loss {loss:.4g}, "
                    f"gradient norm {norm:.4g}); lower optimizer.learning_rate, or raise skip.sigmas or skip.limit."
                )
            log.warning("step %d is skipped: its loss %.4g or gradient norm %.4g is far off", step, loss, norm)
            return False
        self.skipped_in_a_row = 0
        if math.isfinite(loss) and math.isfinite(norm):
            self.recent.append([loss, norm])
            del self.recent[: -self.config.window]
        return True
