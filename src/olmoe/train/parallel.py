"""How ranks share a run, apart from the shards themselves: valid splits, and what is summed over ranks.

torch's sharding machinery is used only in `sharding`, so that a single process need not wait for its import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError
from olmoe.model import Experts
from olmoe.runtime import no_grad
from olmoe.train import recompute
from olmoe.train.config import BatchConfig, ComputeConfig, ParallelConfig
from olmoe.train.optim import scale_down
from olmoe.train.ranks import Ranks
from olmoe.train.shards import local
from olmoe.train.step import StepReport
from olmoe.weights.names import parameter_shapes

# Of a model that `is_gathered_at_once`: 1 GB of weights in fp32, and as much of gradients, on each rank.
WHOLE_PARAMETERS = 2**28


class Sharing(Protocol):
    """What decides how ranks share a run; training configurations say all of it."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def batch(self) -> BatchConfig:
        """Sequences of a step."""
        ...

    @property
    def parallel(self) -> ParallelConfig:
        """Ranks, and what each of them holds."""
        ...

    @property
    def compute(self) -> ComputeConfig:
        """How a layer computes."""
        ...


@dataclass(frozen=True)
class Shared:
    """`Sharing` put together by hand."""

    model: ModelConfig
    batch: BatchConfig
    parallel: ParallelConfig
    compute: ComputeConfig


def is_parallel(config: Sharing, ranks: Ranks) -> bool:
    """Whether a run trains a sharded model; one process trains a plain one if weights are fp32."""
    return ranks.size > 1 or config.compute.precision == "bf16"


def check(config: Sharing, ranks: Ranks, command: str = "train") -> None:
    """Raise `ConfigError` if the configuration of that command cannot be shared by these ranks."""
    parallel, sequences = config.parallel, config.batch.sequences
    wanted = parallel.ranks(ranks.size)
    if wanted != ranks.size:
        asked = " x ".join(
            f"{name} = {value}" for name, value in (("data", parallel.data), ("expert", parallel.expert)) if value
        )
        raise ConfigError(
            f"[parallel] {asked} is for {wanted} processes, but there are {ranks.size}; start it with torchrun "
            f"--nproc-per-node {wanted} -m olmoe {command} CONFIG.toml, or change [parallel]."
        )
    data = ranks.size // parallel.expert
    if data % parallel.replicate:
        raise ConfigError(f"parallel.replicate {parallel.replicate} must divide the {data} ranks of parallel.data.")
    if sequences % ranks.size:
        raise ConfigError(
            f"batch.sequences {sequences} is the microbatch of all {ranks.size} ranks together, so it must be a "
            f"multiple of {ranks.size}."
        )
    experts = config.model.num_experts
    if experts % parallel.expert:
        raise ConfigError(f"parallel.expert {parallel.expert} must divide the {experts} experts of the model.")
    if parallel.expert > 1:
        placement(config, data // parallel.replicate)


def placement(config: Sharing, shards: int) -> int:
    """The dimension along which the experts of one rank are sharded: experts if they suffice, else their rows.

    Raises `ConfigError` if neither can be cut evenly.
    """
    model = config.model
    if model.num_experts // config.parallel.expert % shards == 0:
        return 0
    if model.hidden_size % shards or 2 * model.intermediate_size % shards:
        raise ConfigError(
            f"The {model.num_experts} experts cannot be cut evenly over parallel.expert {config.parallel.expert} and "
            f"{shards} shards; choose numbers that divide them, or their hidden_size and intermediate_size."
        )
    return 1


def is_gathered_at_once(config: ModelConfig) -> bool:
    """Whether all parameters fit in memory so easily that they are gathered once a step, by one message.

    Otherwise layers are gathered one by one, in forward and in backward.
    """
    return sum(math.prod(shape) for shape in parameter_shapes(config).values()) <= WHOLE_PARAMETERS


def arrange(layer: Any, config: Sharing) -> None:
    """How one layer computes, on one rank or many: what backward recomputes, and compilation."""
    recompute.wrap(layer, config.compute.activation_checkpointing)
    if config.compute.compile:
        # Experts across ranks are sharded by themselves, so that a graph ends where they begin.
        layer.forward = torch.compile(layer.forward, fullgraph=type(layer.mlp.experts) is Experts)


def combine(report: StepReport, ranks: Ranks) -> None:
    """Add to a report what the other ranks measured."""
    assert report.counts_LE is not None
    assert report.margins_L2 is not None
    counts_LE, margins_L2 = report.counts_LE, report.margins_L2
    losses = counts_LE.new_tensor([report.cross_entropy, report.load_balancing, report.router_z], dtype=torch.float64)
    # One message: whole numbers as large as counts are exact in fp64.
    own = torch.cat([part.double().flatten() for part in (losses, counts_LE, margins_L2)])
    losses, counts, margins = ranks.sum(own).split([3, counts_LE.numel(), margins_L2.numel()])
    report.cross_entropy, report.load_balancing, report.router_z = losses.tolist()
    report.counts_LE = counts.view_as(counts_LE).to(counts_LE.dtype)
    report.margins_L2 = margins.view_as(margins_L2).to(margins_L2.dtype)


def clip_across(ranks: Ranks, replicate: int) -> Callable[[Iterable[Tensor], float], Tensor]:
    """`clip_gradients` where each of `replicate` groups of ranks holds every gradient once, in shards.

    A parameter's mesh does not matter: the square of a norm is the sum over shards, wherever they are.
    """

    @no_grad
    def clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
        squares = ranks.sum(norms.double().square().sum())
        norm = (squares / replicate).sqrt().float()
        scale_down(gradients, norm, max_norm)
        return norm

    return clip
