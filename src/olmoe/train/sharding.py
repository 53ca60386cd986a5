"""The network sharded over ranks, from outside: FSDP2 by layer, expert parallel, or both.

Ranks form two meshes over the same processes, `replicate` slowest and `expert` fastest:

    all parameters but experts   (replicate, ranks)            sharded over data x expert / replicate ranks
    experts                      (replicate, data, expert)     whole experts by `expert`, each then over `data`

Every rank reads its own windows. Gradients are summed, not averaged, because losses are divided by the positions
and microbatches of the whole step; so dense and expert gradients need no correction whatever the meshes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from olmoe.model import CausalLM, without_values
from olmoe.quant import PackedModule
from olmoe.train.config import ParallelConfig
from olmoe.train.expert_parallel import DispatchInMemory, ExpertsAcrossRanks
from olmoe.train.one_machine import GatherInMemory, ReduceInMemory, SharedMemory
from olmoe.train.parallel import Sharing, arrange, is_gathered_at_once, placement
from olmoe.train.ranks import Ranks

Found = dict[tuple[int, ...], SharedMemory | None]  # by the ranks that share it


def build_parallel(config: Sharing, ranks: Ranks, device: torch.device, model: CausalLM | None = None) -> CausalLM:
    """The network of a configuration, sharded over all ranks, its values not set.

    `model` may be one of that architecture to shard instead, such as one with adapters, whose values stay where it has
    any; packed weights are not sharded, each rank keeps all of them.

    Copies (`parallel.replicate`) on one machine are sharded each by itself, and gradients are added in its memory.

    At most one layer is whole at any time. The order matters: experts to their ranks, recomputation, compilation,
    sharding of experts, layers and the rest, which alone stays whole between forward and backward because the
    objective reads the output head. Of a model that `is_gathered_at_once` the layers belong to that rest.
    """
    model = without_values(config.model) if model is None else model
    parallel, compute = config.parallel, config.compute
    dense, sparse, expert = _meshes(parallel, ranks, device)
    found: Found = {}
    copies = _memory_of(dense, 0, found) if dense.ndim > 1 else None
    if copies is not None:  # FSDP knows of one
        dense, sparse = dense["ranks"], None if sparse is None else sparse["data"]
    lower = torch.bfloat16 if compute.precision == "bf16" else None
    options: dict[str, Any] = {
        # Inputs are not cast: the angles of positions and the weights of experts stay in fp32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    }
    cut = None if sparse is None else Shard(placement(config, sparse.size(-1)))
    ignored = {p for m in model.modules() if isinstance(m, PackedModule) for p in m.parameters(recurse=False)}
    options["ignored_params"] = ignored
    tied = config.model.tie_word_embeddings and model.lm_head.weight.is_meta  # on the meta device they were one
    at_once = is_gathered_at_once(config.model)
    layers: list[Any] = list(model.model.layers)
    for layer in layers:
        if expert is not None:
            layer.mlp.experts = ExpertsAcrossRanks(config.model, expert, device)
        _allocate(layer, device)
        arrange(layer, config)
        if sparse is not None and sparse.size() == parallel.replicate == 1 and lower is None:
            ignored.update(layer.mlp.experts.parameters())  # whole here: FSDP would copy them and their gradients
        elif sparse is not None:
            fully_shard(layer.mlp.experts, mesh=sparse, shard_placement_fn=lambda _: cut, **options)
        if not at_once:
            fully_shard(layer, mesh=dense, **options)
    _allocate(model, device)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    fully_shard(model, mesh=dense, **options)
    for module in model.modules():
        mesh = sparse if isinstance(module, ExpertsAcrossRanks) else dense
        if isinstance(module, FSDPModule):
            if mesh is not None and mesh.size() > 1:  # else FSDP divides by 1, number by number
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _share_memory(model, dense, sparse, expert, copies, found)
    return model


def _share_memory(
    model: CausalLM,
    dense: DeviceMesh,
    sparse: DeviceMesh | None,
    expert: DeviceMesh | None,
    copies: SharedMemory | None,
    found: Found,
) -> None:
    """Let shards, tokens and sums travel through memory instead of sockets between ranks of one machine."""
    of_dense, of_sparse, of_experts = (_memory_of(mesh, -1, found) for mesh in (dense, sparse, expert))
    for module in model.modules():
        if isinstance(module, ExpertsAcrossRanks) and of_experts is not None:
            module.dispatch = DispatchInMemory(of_experts)
        memory = of_sparse if isinstance(module, ExpertsAcrossRanks) else of_dense
        if isinstance(module, FSDPModule) and memory is not None:
            module.set_custom_all_gather(GatherInMemory(memory))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(ReduceInMemory(memory))  # type: ignore[arg-type]
        if isinstance(module, FSDPModule) and copies is not None:
            module.set_all_reduce_hook(copies.sum)


def _memory_of(mesh: DeviceMesh | None, dimension: int, found: Found) -> SharedMemory | None:
    """The memory of the ranks along a dimension, which may have been found before; None if they share none."""
    if mesh is None or mesh.device_type != "cpu" or mesh.size(dimension) == 1:
        return None
    group = mesh.get_group(dimension % mesh.ndim)
    members = tuple(dist.get_process_group_ranks(group))
    if members not in found:
        found[members] = SharedMemory.of(group)
    return found[members]


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


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a module that have no memory some, its values not set."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, device=device)
                setattr(part, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
