"""A shared expert, for experiments: one that every token uses beside those that the router chooses for it.

OLMoE has none, because its paper found that one of the experts shared is slightly worse than all of them routed
(figure 6), and neither the network nor its file format has one. Here it is put around the network from outside, as
dropout is: blocks are swapped for ones with a further expert, whose output is added with the weight 1. Its matrices
are saved among the others under names that every other loader refuses.

    h = x + sum over the top-k routed experts e of p_e * expert_e(x') + shared(x')

Shapes legend: N tokens, D hidden; `...` any leading dimensions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError, ConfigError
from olmoe.model import CausalLM, Experts, RouterOutput, SparseMoeBlock
from olmoe.ops.types import RoutePolicy
from olmoe.train.config import TrainConfig
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.hf_folder import HFFolder
from olmoe.weights.source import WeightSource

_PLACE = ".mlp.shared_expert."  # in the name of a parameter


class SharedExpertBlock(SparseMoeBlock):
    """A mixture of experts with one more that all tokens use. It is not part of what the router decided."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__(config)
        self.shared_expert = Experts(
            dataclasses.replace(config, num_experts=1, num_experts_per_tok=1, intermediate_size=width)
        )

    def forward(self, x: Tensor, policy: RoutePolicy | None = None) -> tuple[Tensor, RouterOutput]:
        """x (..., D) -> (..., D) and what the router decided for the flattened tokens."""
        y, routed = super().forward(x, policy)
        x_ND = x.reshape(-1, x.shape[-1])
        ids_N1 = torch.zeros(len(x_ND), 1, dtype=routed.expert_ids.dtype, device=x.device)
        weights_N1 = torch.ones(len(x_ND), 1, dtype=routed.weights.dtype, device=x.device)
        return y + self.shared_expert(x_ND, ids_N1, weights_N1).view(x.shape), routed


def parameters(config: TrainConfig) -> int:
    """How many parameters the shared experts of a run's model are, all of them active."""
    return 3 * config.shared_expert.width * config.model.hidden_size * config.model.num_hidden_layers


def add(model: CausalLM, width: int) -> None:
    """Give every block of a model that has no weights yet a shared expert of this width."""
    for layer in model.model.layers:
        layer.mlp = SharedExpertBlock(model.config, width)


def check(config: TrainConfig, is_parallel: bool) -> None:
    """Raise `ConfigError` for a shared expert in a run whose model is sharded."""
    if config.shared_expert.width and is_parallel:
        raise ConfigError(
            f"shared_expert.width {config.shared_expert.width} is trained by one process, with activations in fp32; "
            'leave out [shared_expert], or torchrun and compute.precision "bf16" ("bf16-products" is possible).'
        )


def source_of(folder: Path, model: CausalLM) -> WeightSource:
    """The weights of a checkpoint of training for this model, which may have shared experts.

    Raises `CheckpointError` if the checkpoint lacks something that the model has.
    """
    if not any(isinstance(layer.mlp, SharedExpertBlock) for layer in model.model.layers):
        return Checkpoint.open(folder).source()
    source = _SharedExpertFolder(folder)
    source.check()
    return source


class _SharedExpertFolder(HFFolder):
    """A checkpoint folder with shared experts among its tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shared = {name: self.stored.pop(name) for name in list(self.stored) if _PLACE in name}

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        if _PLACE not in parameter:
            return super().read(parameter, expert)
        if parameter not in self._shared:
            raise CheckpointError(f"{self.path} lacks {parameter}; it was trained without a shared expert.")
        return self._counted(self._handle(self._shared[parameter].file).get_tensor(parameter))
