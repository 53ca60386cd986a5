"""An adapter: two small matrices for each adapted matrix W, so that W + (alpha / rank) B A takes its place.

Each expert has its own factors, in a stack.

Shapes legend: R rows (out), C columns (in), r rank, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.weights.names import parameter_shapes

TARGETS = {
    "attention": tuple(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "router": ("mlp.gate.weight",),
}


class Factors(NamedTuple):
    """A (r, C) and B (R, r); for a stack of experts (E, r, C) and (E, R, r)."""

    a: Tensor
    b: Tensor


@dataclass
class Adapter:
    """The factors of each adapted parameter, under its name in the network."""

    rank: int
    alpha: float
    factors: dict[str, Factors]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def delta(self, name: str, expert: int | None = None) -> Tensor:
        """What is added to a matrix, in fp32: (R, C), or (E, R, C) for a whole stack."""
        a, b = (factor.float() if expert is None else factor[expert].float() for factor in self.factors[name])
        return (b @ a) * self.scale


def targeted(config: ModelConfig, targets: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The parameters that these `TARGETS` mean, with their shapes."""
    ends = tuple(end for target in targets for end in TARGETS[target])
    return {name: shape for name, shape in parameter_shapes(config).items() if name.endswith(ends)}


def new_adapter(config: ModelConfig, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> Adapter:
    """An adapter that changes nothing yet: B is zero, A is initialised as torch initialises linear layers."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (*stack, rows, columns) in targeted(config, targets).items():
        bound = 1 / math.sqrt(columns)
        a = torch.empty(*stack, rank, columns).uniform_(-bound, bound, generator=generator)
        factors[name] = Factors(a, torch.zeros(*stack, rows, rank))
    return Adapter(rank, alpha, factors)
