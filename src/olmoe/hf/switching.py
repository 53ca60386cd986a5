"""Experts implementations of transformers' interface for our models, switchable at run time.

"eager" (the default) and "olmoe" are our own kernels; "grouped_mm", "batched_mm" and whatever else is registered
with transformers compute the same from the same weights. The choice is read from the configuration at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from olmoe.hf.experts_interface import LAYOUT, NAME

OURS = ("eager", NAME)


class OurExpertsInterface(ExpertsInterface):
    """transformers' interface, in which both of our names mean the default."""

    def get_interface(self, experts_implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
        """The function that computes experts under that name; `default` is the experts' own forward."""
        if is_ours(experts_implementation):
            return default
        function = super().get_interface(experts_implementation, default)

        def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            # Routing weights are fp32 here, but have the dtype of hidden states in transformers' routers.
            computed: Tensor = function(module, hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype))
            return computed

        return forward


EXPERTS = OurExpertsInterface()


def is_ours(implementation: str | None) -> bool:
    """Whether experts compute themselves under that name."""
    return implementation is None or implementation in OURS


def describe(experts: Any, config: Any) -> None:
    """Give packed experts the attributes by which other software recognises experts and their layout."""
    experts.config, experts._is_expert_parallel = config, False
    for name, (value, _) in LAYOUT.items():
        setattr(experts, name, value)


class SwitchableExperts:
    """Mixed into our pre-trained classes: called by transformers to choose how experts are computed."""

    config: Any

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation to use for a request: our own unless another one is named. Unknown names are refused."""
        if requested_experts is None or requested_experts in OURS:
            return requested_experts or OURS[0]
        return super().get_correct_experts_implementation(requested_experts)  # type: ignore[misc]
