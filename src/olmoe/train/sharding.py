"""The network sharded over ranks, from outside: FSDP2 by layer, expert parallel, or both.

Ranks form two meshes over the same processes, `replicate` slowest and `expert` fastest:

    all parameters but experts   (replicate, ranks)            sharded over data x expert / replicate ranks
    experts                      (replicate, data, expert)     whole experts by `expert`, each then over `data`

Every rank reads windows of its own. Gradients are summed, not averaged, because losses are divided by the positions
and microbatches of the whole step; so dense and expert gradients need no correction whatever the meshes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from olmoe.model import CausalLM, without_values
from olmoe.train.config import ParallelConfig, TrainConfig
from olmoe.train.expert_parallel import ExpertsAcrossRanks
from olmoe.train.parallel import arrange, placement
from olmoe.train.ranks import Ranks
from olmoe.weights.names import parameter_shapes

# Of a model that `stays_whole`: 1 GB of weights in fp32, on each rank.
WHOLE_PARAMETERS = 2**28


def build_parallel(config: TrainConfig, ranks: Ranks, device: torch.device) -> CausalLM:
    """The network of a configuration, sharded over all ranks, its values not set.

    At most one layer is whole at any time, or, of a model that `stays_whole`, all of them until backward. The order
    matters: experts to their ranks, recomputation, compilation, sharding of experts, layers and the rest, which always
    stays whole between forward and backward because the objective reads the output head.
    """
    model, parallel, compute = without_values(config.model), config.parallel, config.compute
    dense, sparse, expert = _meshes(parallel, ranks, device)
    lower = torch.bfloat16 if compute.precision == "bf16" else None
    options: dict[str, Any] = {
        # Inputs are not cast: the angles of positions and the weights of experts stay in fp32.
        "mp_policy": MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": not stays_whole(config),
    }
    cut = None if sparse is None else Shard(placement(config, sparse.size(-1)))
    layers: list[Any] = list(model.model.layers)
    for layer in layers:
        if expert is not None:
            layer.mlp.experts = ExpertsAcrossRanks(config.model, expert, device)
        _allocate(layer, device)
        arrange(layer, config)
        if expert is not None:
            fully_shard(layer.mlp.experts, mesh=sparse, shard_placement_fn=lambda _: cut, **options)
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


def stays_whole(config: TrainConfig) -> bool:
    """Whether all parameters fit in memory so easily that layers stay whole between forward and backward.

    Otherwise they are gathered twice, to save it.
    """
    return sum(math.prod(shape) for shape in parameter_shapes(config.model).values()) <= WHOLE_PARAMETERS


def keep_whole(model: CausalLM, whole: bool) -> None:
    """Let layers stay whole between forward and backward, or be gathered again."""
    for module in model.model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(not whole, recurse=False)


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
                setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
