"""One optimizer step: microbatches forward and backward, clipping, the update.

Nothing here knows files, evaluation or how many processes train: the caller says which microbatches this process
computes and what the sums of the whole step are divided by, and may clip in another way.

Shapes legend: B windows of a microbatch, T positions, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from olmoe.errors import ConfigError
from olmoe.model import CausalLM
from olmoe.train.config import OptimizerConfig, TrainConfig
from olmoe.train.data import Mixture
from olmoe.train.dropout import residual_dropout
from olmoe.train.losses import objective
from olmoe.train.optim import clip_gradients, learning_rate
from olmoe.train.repetitions import has_repetition


class Microbatch(NamedTuple):
    """Windows of ids (B, T), and the number of the first one within the run, which seeds all randomness in them.

    `trained` (B,) is false for windows whose predictions are not trained; None if all are.
    """

    first: int
    windows: Tensor
    trained: Tensor | None = None


@dataclass(frozen=True)
class Scales:
    """The divisors of a step's sums: all its positions and microbatches, whichever process computes them."""

    positions: int
    microbatches: int

    @classmethod
    def of(cls, config: TrainConfig, ranks: int = 1) -> Scales:
        """Those of a step of this configuration, of which each of `ranks` processes computes its share."""
        return cls(config.tokens_per_step, config.batch.accumulation * ranks)


@dataclass
class StepReport:
    """What a step measured: the losses without their weights, and how many tokens each expert received."""

    cross_entropy: float = 0.0
    load_balancing: float = 0.0
    router_z: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    counts_LE: Tensor | None = None
    margins_L2: Tensor | None = None  # see `router_margins`
    skipped: bool = False

    @property
    def max_load_over_mean(self) -> float:
        """The load of the busiest expert over the mean, averaged over layers."""
        assert self.counts_LE is not None
        return float((self.counts_LE.amax(dim=1) / self.counts_LE.float().mean(dim=1)).mean())

    def values(self) -> dict[str, Any]:
        """What a metrics record says of the step, by name; of routing also by layer, and tokens by layer and expert."""
        names = ("cross_entropy", "load_balancing", "router_z", "learning_rate", "grad_norm", "max_load_over_mean")
        skipped = {"skipped": True} if self.skipped else {}
        return {name: getattr(self, name) for name in names} | self._routing() | skipped

    def _routing(self) -> dict[str, Any]:
        """How evenly a layer uses its experts (entropy; 1 is evenly), how many none chose, and the tokens of each."""
        assert self.counts_LE is not None
        counts_LE = self.counts_LE.cpu()
        shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
        entropy_L = torch.special.entr(shares_LE).sum(dim=1) / math.log(max(counts_LE.shape[1], 2))
        return {
            "expert_entropy": [round(entropy, 4) for entropy in entropy_L.tolist()],
            "dead_experts": (counts_LE == 0).sum(dim=1).tolist(),
            "expert_load": counts_LE.tolist(),
        } | self._margins()

    def _margins(self) -> dict[str, list[float | None]]:
        """By layer, how far the first expert is above the second, and the last one chosen above those left out."""
        if self.margins_L2 is None:
            return {}
        names = ("router_margin", "router_cutoff_margin")
        rounded = [[round(m, 5) if math.isfinite(m) else None for m in values] for values in self.margins_L2.T.tolist()]
        return dict(zip(names, rounded, strict=True))


def microbatches(
    mixture: Mixture, config: TrainConfig, step: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Iterator[Microbatch]:
    """The microbatches of a step (counted from 0), which follow from its number; of each, one of `ranks`' share."""
    sequences, accumulation = config.batch.sequences // ranks, config.batch.accumulation
    for number in range(step * accumulation, (step + 1) * accumulation):
        first = (number * ranks + rank) * sequences
        windows = np.stack([mixture.window(i) for i in range(first, first + sequences)])
        trained = None
        if times := config.data.mask_repetitions:
            trained = torch.tensor([not has_repetition(ids, times) for ids in windows], device=device)
        yield Microbatch(first, torch.from_numpy(windows).to(device), trained)


def accumulate(
    model: CausalLM,
    batches: Iterable[Microbatch],
    scales: Scales,
    config: TrainConfig,
    report: StepReport,
    count: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Add the gradients of these microbatches to the model's, and what they measure to the report.

    `count` is `objective`'s.
    """
    for batch in batches:
        with residual_dropout(model, config.regularization.residual_dropout, config.run.seed + batch.first):
            losses = objective(
                model,
                batch.windows,
                config.loss,
                positions_in_step=scales.positions,
                microbatches=scales.microbatches,
                count=count,
                eos_id=config.mask_eos_id,
                trained_B=batch.trained,
            )
            losses.objective.backward()  # around backward too, so that recomputation drops the same values
        report.cross_entropy += float(losses.cross_entropy)
        report.load_balancing += float(losses.load_balancing) / scales.microbatches
        report.router_z += float(losses.router_z) / scales.microbatches
        report.counts_LE = losses.counts_LE if report.counts_LE is None else report.counts_LE + losses.counts_LE
        margins_L2 = losses.margins_L2 / scales.microbatches
        report.margins_L2 = margins_L2 if report.margins_L2 is None else report.margins_L2 + margins_L2


def train_step(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Microbatch],
    scales: Scales,
    config: TrainConfig,
    tokens: int,
    clip: Callable[[Iterable[Tensor], float], Tensor] = clip_gradients,
    combine: Callable[[StepReport], None] = lambda report: None,
    admits: Callable[[float, float, int], bool] = lambda loss, norm, step: True,
    count: Callable[[Tensor], Tensor] | None = None,
) -> StepReport:
    """Train `model` by one step after `tokens` tokens of training.

    `clip` scales the gradients down to a norm and returns the one they had; where parameters are sharded, that is a
    norm over all processes. `combine` adds to a report what the other processes measured, and `admits` says of the
    loss, the norm and the step's number whether the weights may change. Raises `ConfigError` if they would by a norm
    that is not finite.
    """
    report = StepReport(learning_rate=learning_rate(config.schedule, config.optimizer.learning_rate, tokens))
    for group in optimizer.param_groups:
        group["lr"] = report.learning_rate
    accumulate(model, batches, scales, config, report, count)
    combine(report)
    report.grad_norm = float(clip(model.parameters(), config.optimizer.max_grad_norm))
    step = tokens // config.tokens_per_step + 1
    report.skipped = not admits(report.cross_entropy, report.grad_norm, step)
    if not report.skipped:
        check_finite("gradient norm", report.grad_norm, step, config)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return report


class HasOptimizer(Protocol):
    """A configuration of any kind of training."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The settings of the optimizer."""
        ...


def check_finite(what: str, value: float, step: int, config: HasOptimizer) -> None:
    """Raise `ConfigError` for a value that shows that training diverged."""
    if not np.isfinite(value):
        raise ConfigError(
            f"The {what} is {value} at step {step}; lower optimizer.learning_rate "
            f"(now {config.optimizer.learning_rate})."
        )
