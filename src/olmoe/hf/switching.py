"""Experts implementations of transformers' interface for our models, switchable at run time.

"eager" (the default) and "olmoe" are our own kernels; "grouped_mm", "batched_mm" and whatever else is registered
with transformers compute the same from the same weights. transformers switches classes that carry its
`@use_experts_implementation`; ours keep the network's modules, and a switched one changes its class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from olmoe.hf.experts_interface import NAME
from olmoe.model import Experts

OURS = ("eager", NAME)


class InterfacedExperts(Experts):
    """`Experts` computed by a function of transformers' experts interface, with the attributes that those look for."""

    config: Any
    has_gate = is_concatenated = True
    has_bias = has_post_expert_norm = is_transposed = _is_expert_parallel = False
    _apply_gate = _default_apply_gate

    @property
    def num_experts(self) -> int:
        """How many experts this module holds."""
        return self.gate_up_proj.shape[0]

    @property
    def act_fn(self) -> Any:
        """The activation under transformers' name."""
        return self.activation

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D)."""
        function = ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation]
        return function(self, x_ND, expert_ids_NK, weights_NK.to(x_ND.dtype))


class SwitchableExperts:
    """Mixed into our pre-trained classes: what transformers calls to choose how experts are computed."""

    config: Any

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The implementation to use for a request: our own unless another one is named. Unknown names are refused."""
        if requested_experts is None or requested_experts in OURS:
            return requested_experts or OURS[0]
        return super().get_correct_experts_implementation(requested_experts)  # type: ignore[misc]

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Compute experts by "eager" or "olmoe" (ours), or by a function of transformers' experts interface."""
        super().set_experts_implementation(experts_implementation)  # type: ignore[misc]
        self.switch_experts()

    def switch_experts(self) -> None:
        """Give the experts modules the class that the configuration's implementation needs."""
        assert isinstance(self, nn.Module)
        wanted = Experts if self.config._experts_implementation in OURS else InterfacedExperts
        for module in self.modules():
            if type(module) in (Experts, InterfacedExperts):
                module.__class__ = wanted
                if wanted is InterfacedExperts:
                    module.config = self.config
                else:
                    module.__dict__.pop("config", None)
