"""One optimizer step: microbatches forward and backward, clipping, the update.

Nothing here knows files, evaluation or how many processes train: the caller says which microbatches this process
computes and what the sums of the whole step are divided by, and may clip in another way.

Shapes legend: B windows of a microbatch, T positions, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Microbatch(NamedTuple):
    """Windows of ids (B, T), and the number of the first among all of the run, which seeds what is random in them."""

    first: int
    windows: Tensor


@dataclass(frozen=True)
class Scales:
    """What the sums of a step are divided by: all its positions and microbatches, whichever process computes them."""

    positions: int
    microbatches: int

    @classmethod
    def of(cls, config: TrainConfig) -> Scales:
        """Those of a step of this configuration."""
        return cls(config.tokens_per_step, config.batch.accumulation)


@dataclass
class StepReport:
    """What a step measured: the losses without their weights, and how many tokens each expert received."""

    cross_entropy: float = 0.0
    load_balancing: float = 0.0
    router_z: float = 0.0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    counts_LE: Tensor | None = None

    @property
    def max_load_over_mean(self) -> float:
        """The load of the busiest expert over the mean, averaged over layers."""
        assert self.counts_LE is not None
        return float((self.counts_LE.amax(dim=1) / self.counts_LE.float().mean(dim=1)).mean())

    def values(self) -> dict[str, float]:
        """The numbers of a metrics record, by name."""
        names = ("cross_entropy", "load_balancing", "router_z", "learning_rate", "grad_norm", "max_load_over_mean")
        return {name: getattr(self, name) for name in names}


def microbatches(mixture: Mixture, config: TrainConfig, step: int, device: torch.device) -> Iterator[Microbatch]:
    """All microbatches of a step (counted from 0), which follow from its number."""
    sequences, accumulation = config.batch.sequences, config.batch.accumulation
    for number in range(step * accumulation, (step + 1) * accumulation):
        first = number * sequences
        windows = np.stack([mixture.window(i) for i in range(first, first + sequences)])
        yield Microbatch(first, torch.from_numpy(windows).to(device))


def accumulate(
    model: CausalLM, batches: Iterable[Microbatch], scales: Scales, config: TrainConfig, report: StepReport
) -> None:
    """Add the gradients of these microbatches to the model's, and what they measure to the report."""
    for batch in batches:
        with residual_dropout(model, config.regularization.residual_dropout, config.run.seed + batch.first):
            losses = objective(
                model,
                batch.windows,
                config.loss,
                positions_in_step=scales.positions,
                microbatches=scales.microbatches,
            )
        losses.objective.backward()
        report.cross_entropy += float(losses.cross_entropy)
        report.load_balancing += float(losses.load_balancing) / scales.microbatches
        report.router_z += float(losses.router_z) / scales.microbatches
        report.counts_LE = losses.counts_LE if report.counts_LE is None else report.counts_LE + losses.counts_LE


def train_step(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Microbatch],
    scales: Scales,
    config: TrainConfig,
    tokens: int,
    clip: Callable[[Iterable[Tensor], float], Tensor] = clip_gradients,
) -> StepReport:
    """Train `model` by one step after `tokens` tokens of training.

    `clip` scales the gradients down to a norm and returns the one they had; where parameters are sharded, that is a
    norm over all processes. Raises `ConfigError` if it is not finite, before any weight changes.
    """
    report = StepReport(learning_rate=learning_rate(config.schedule, config.optimizer.learning_rate, tokens))
    for group in optimizer.param_groups:
        group["lr"] = report.learning_rate
    accumulate(model, batches, scales, config, report)
    report.grad_norm = float(clip(model.parameters(), config.optimizer.max_grad_norm))
    check_finite("gradient norm", report.grad_norm, tokens // config.tokens_per_step + 1, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return report


class HasOptimizer(Protocol):
    """A configuration of any kind of training."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """How weights change."""
        ...


def check_finite(what: str, value: float, step: int, config: HasOptimizer) -> None:
    """Raise `ConfigError` for a value that shows that training diverged."""
    if not np.isfinite(value):
        raise ConfigError(
            f"The {what} is {value} at step {step}; lower optimizer.learning_rate "
            f"(now {config.optimizer.learning_rate})."
        )
