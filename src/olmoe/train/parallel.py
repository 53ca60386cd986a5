"""Training on several ranks, applied to the network from outside: FSDP2 by layer, expert parallel, or both.

Ranks form two meshes over the same processes, `replicate` slowest and `expert` fastest:

    all parameters but experts   (replicate, ranks)            sharded over data x expert / replicate ranks
    experts                      (replicate, data, expert)     whole experts by `expert`, each then over `data`

Every rank reads windows of its own. Gradients are summed, not averaged, because losses are divided by the positions
and microbatches of the whole step; so dense and expert gradients need no correction whatever the meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from olmoe.errors import ConfigError
from olmoe.model import CausalLM, Experts, without_values
from olmoe.train import recompute
from olmoe.train.config import ParallelConfig, TrainConfig
from olmoe.train.expert_parallel import ExpertsAcrossRanks
from olmoe.train.optim import scale_down
from olmoe.train.ranks import Ranks
from olmoe.train.shards import local
from olmoe.train.step import StepReport


def is_parallel(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether a run trains a sharded model; one process in fp32 trains a plain one."""
    return ranks.size > 1 or config.compute.precision != "fp32"


def check(config: TrainConfig, ranks: Ranks) -> None:
    """Raise `ConfigError` if the configuration cannot be shared by these ranks."""
    parallel, sequences = config.parallel, config.batch.sequences
    wanted = parallel.ranks(ranks.size)
    if wanted != ranks.size:
        asked = " x ".join(
            f"{name} = {value}" for name, value in (("data", parallel.data), ("expert", parallel.expert)) if value
        )
        raise ConfigError(
            f"[parallel] {asked} is for {wanted} processes, but there are {ranks.size}; start it with torchrun "
            f"--nproc-per-node {wanted} -m olmoe train CONFIG.toml, or change [parallel]."
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
        _placement(config, data // parallel.replicate)


def build_parallel(config: TrainConfig, ranks: Ranks, device: torch.device) -> CausalLM:
    """The network of a configuration, sharded over all ranks, its values not set.

    At most one layer is whole at any time. The order matters: experts to their ranks, recomputation, compilation,
    sharding of experts, layers and the rest, which alone stays whole between forward and backward because the
    objective reads the output head.
    """
    model, parallel, compute = without_values(config.model), config.parallel, config.compute
    dense, sparse, expert = _meshes(parallel, ranks, device)
    lower = torch.bfloat16 if compute.precision == "bf16" else None
    options: dict[str, Any] = {
        # Inputs are not cast: the angles of positions and the weights of experts stay in fp32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    }
    placement = None if sparse is None else Shard(_placement(config, sparse.size(-1)))
    layers: list[Any] = list(model.model.layers)
    for layer in layers:
        if expert is not None:
            layer.mlp.experts = ExpertsAcrossRanks(config.model, expert, device)
        _allocate(layer, device)
        arrange(layer, config)
        if expert is not None:
            fully_shard(layer.mlp.experts, mesh=sparse, shard_placement_fn=lambda _: placement, **options)
        fully_shard(layer, mesh=dense, **options)
    _allocate(model, device)
    if config.model.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # on the meta device they were one
    fully_shard(model, mesh=dense, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def rest(model: CausalLM) -> None:
    """Let a sharded model's parameters be shards again after a forward pass that no backward followed."""
    if isinstance(model, FSDPModule):
        model.reshard()


def arrange(layer: Any, config: TrainConfig) -> None:
    """How one layer computes, on one rank or many: what backward recomputes, and compilation."""
    recompute.wrap(layer, config.compute.activation_checkpointing)
    if config.compute.compile:
        # Experts across ranks are sharded by themselves, so that a graph ends where they begin.
        layer.forward = torch.compile(layer.forward, fullgraph=type(layer.mlp.experts) is Experts)


def combine(report: StepReport, ranks: Ranks) -> None:
    """Add to a report what the other ranks measured."""
    own = [report.cross_entropy, report.load_balancing, report.router_z]
    summed = ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
    report.cross_entropy, report.load_balancing, report.router_z = summed
    if report.counts_LE is not None:
        report.counts_LE = ranks.sum(report.counts_LE)


def clip_across(ranks: Ranks, replicate: int) -> Callable[[Iterable[Tensor], float], Tensor]:
    """`clip_gradients` where each of `replicate` groups of ranks holds every gradient once, in shards.

    A parameter's mesh does not matter: the square of a norm is the sum over shards, wherever they are.
    """

    @torch.no_grad()
    def clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        squares = ranks.sum(torch.stack(norms).square().sum())
        norm = (squares / replicate).sqrt().float()
        scale_down(gradients, norm, max_norm)
        return norm

    return clip


def _meshes(
    parallel: ParallelConfig, ranks: Ranks, device: torch.device
) -> tuple[DeviceMesh, DeviceMesh | None, DeviceMesh | None]:
    """The meshes of dense parameters, of an expert's shards, and of experts; the last two where experts are shared."""
    copies, shards = parallel.replicate, ranks.size // parallel.replicate
    if copies > 1:
        dense = init_device_mesh(device.type, (copies, shards), mesh_dim_names=("replicate", "ranks"))
    else:
        dense = init_device_mesh(device.type, (shards,), mesh_dim_names=("ranks",))
    if parallel.expert == 1:
        return dense, None, None
    shape = (copies, shards // parallel.expert, parallel.expert)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "data", "expert"))
    return dense, mesh["replicate", "data"] if copies > 1 else mesh["data"], mesh["expert"]


def _placement(config: TrainConfig, shards: int) -> int:
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


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a module that have no memory some, its values not set."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
