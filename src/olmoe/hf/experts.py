"""The routed experts behind transformers' signature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from olmoe import ops
from olmoe.hf.config import OlmoeConfig
from olmoe.hf.experts_interface import experts_forward
from olmoe.hf.loading import accept_single_experts
from olmoe.hf.switching import EXPERTS, is_ours
from olmoe.model import Experts
from olmoe.ops.cpu import extension


def present(ids_NK: Tensor, weights_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Ids and weights of existing experts only: the id `experts` means none, and gets a weight of 0.

    transformers' experts accept it, and a hook on a router may return anything. Raises `IndexError` for other ids, with
    which weights would be read from wrong places.
    """
    if ids_NK.numel() == 0 or extension.unsupported(ids_NK) is not None:  # values cannot be read
        return ids_NK, weights_NK
    low, high = (int(limit) for limit in ids_NK.aminmax())
    if low < 0 or high > experts:
        raise IndexError(f"expert ids from {low} to {high} are not all below {experts}")
    if high < experts:
        return ids_NK, weights_NK
    absent_NK = ids_NK == experts
    return ids_NK.masked_fill(absent_NK, 0), weights_NK.masked_fill(absent_NK, 0)


@use_experts_implementation(experts_interface=EXPERTS)
class OlmoeExperts(Experts):
    """The network's experts under transformers' signature, or whatever its experts interface puts in their place."""

    computes_as = Experts

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(OlmoeConfig.network(config))
        self.act_fn: nn.Module = ACT2FN[config.hidden_act]
        accept_single_experts(self)

    def computes_itself(self) -> bool:
        """Whether these experts compute, and not a function of the interface."""
        config: Any = self.config
        return is_ours(config._experts_implementation) and not self._is_expert_parallel

    def fitting_backend(self) -> str:
        """`backend`, or one that can train the activation's parameters: others only take functions of one argument."""
        return "reference" if any(p.requires_grad for p in self.act_fn.parameters()) else self.backend

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (N, D), expert ids and weights (N, K) -> (N, D)."""
        if self._is_expert_parallel:
            return experts_forward(self, hidden_states, top_k_index, top_k_weights)
        ids_NK, weights_NK = present(top_k_index, top_k_weights, self.gate_up_proj.shape[0])
        inputs = hidden_states, weights_NK, ids_NK, self.gate_up_proj, self.down_proj
        return ops.moe(*inputs, self.activation, backend=self.fitting_backend())
