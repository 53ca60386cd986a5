"""Experts implementations of transformers' interface for our models, switchable at run time.

"eager" (the default) and "olmoe" are our own kernels; "grouped_mm", "batched_mm" and whatever else is registered
with transformers compute the same from the same weights. transformers switches classes that carry its
`@use_experts_implementation`; ours keep the network's modules, and a switched one changes its class.

transformers' tensor and expert parallelism wraps the `forward` that an experts module has when the model is
distributed, and reads the same attributes. Experts of such a model are therefore of the interfaced class from then
on, whatever computes them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from olmoe.hf.experts_interface import NAME, experts_forward
from olmoe.model import Experts

OURS = ("eager", NAME)


class InterfacedExperts(Experts):
    """`Experts` computed by a function of transformers' experts interface, with the attributes that those look for.

    Expert parallelism sets `num_experts` to how many this process holds, and `_is_expert_parallel`.
    """

    config: Any
    num_experts: int
    distributed: bool  # whether transformers wrapped `forward`
    has_gate = is_concatenated = True
    has_bias = has_post_expert_norm = is_transposed = _is_expert_parallel = False
    _apply_gate = _default_apply_gate

    @classmethod
    def take(cls, module: Experts, config: Any, distributed: bool) -> None:
        """Make `module` one of this class, with the implementation that `config` names at each call."""
        module.__class__ = cls
        module.config, module.distributed = config, distributed  # type: ignore[assignment]
        module.num_experts = module.gate_up_proj.shape[0]  # type: ignore[assignment]

    def give_back(self) -> None:
        """Make this module plain `Experts` again."""
        for name in ("config", "distributed", "num_experts"):
            del self.__dict__[name]
        self.__class__ = Experts  # type: ignore[assignment]

    @property
    def act_fn(self) -> Any:
        """The activation under transformers' name."""
        return self.activation

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D)."""
        implementation = self.config._experts_implementation
        if implementation not in OURS:
            return ALL_EXPERTS_FUNCTIONS[implementation](self, x_ND, expert_ids_NK, weights_NK.to(x_ND.dtype))
        if self._is_expert_parallel:
            return experts_forward(self, x_ND, expert_ids_NK, weights_NK)
        return super().forward(x_ND, expert_ids_NK, weights_NK)


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
        plain = self.config._experts_implementation in OURS
        for module in self.modules():
            if type(module) is Experts and not plain:
                InterfacedExperts.take(module, self.config, distributed=False)
            elif type(module) is InterfacedExperts and plain and not module.distributed:
                module.give_back()

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """transformers' hook that applies parallelism to a new model, before its weights are loaded."""
        if mesh_manager is not None:
            for module in model.modules():
                if type(module) in (Experts, InterfacedExperts):
                    InterfacedExperts.take(module, model.config, distributed=True)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
