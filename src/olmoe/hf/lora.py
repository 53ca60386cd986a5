"""PEFT's LoRA on routed experts, computed for the experts that were routed to.

PEFT wraps the experts once for each parameter named in `target_parameters`, and in every forward pass adds the
low-rank product to the whole stack, whatever the router chose: a token's decoding step then reads and writes
all E experts instead of K. Here the sum is formed for the chosen ones.

Shapes legend: N tokens, D hidden, E experts, K experts per token, U distinct experts chosen, F expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from olmoe import ops
from olmoe.hf.switching import is_ours
from olmoe.model import Experts, network_type
from olmoe.ops.transforms import mapped


def route_lora(layers: nn.ModuleList) -> None:
    """Make PEFT's wrappers around the experts of `layers` compute only what was routed to.

    The wrappers keep their parameters, names and methods, so saving, merging and switching adapters are PEFT's.
    Experts that PEFT did not wrap are left alone; so is everything while a graph is compiled.
    """
    if torch.compiler.is_compiling():
        return
    for layer in layers:
        experts: Any = getattr(getattr(layer, "mlp", None), "experts", None)
        if isinstance(experts, Experts) or not hasattr(experts, "parameter_name"):
            continue
        from peft.tuners.lora.layer import ParamWrapper

        known = type(experts) is ParamWrapper and hasattr(ParamWrapper, "get_delta_factors")  # PEFT 0.21 and later
        if known and network_type(experts.get_base_layer()) is Experts:
            experts.__class__ = _routed_wrapper(ParamWrapper)


@functools.cache
def _routed_wrapper(wrapper: Any) -> type:
    """A subclass of PEFT's wrapper with a forward pass of its own. (PEFT is optional, so it is made on demand.)"""

    class RoutedParamWrapper(wrapper):
        """`lora.ParamWrapper` around experts; the outermost of the nested ones."""

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            """x (N, D), expert ids and weights (N, K) -> (N, D)."""
            base = self.get_base_layer()
            other_implementation = network_type(base) is not Experts or not is_ours(base.config._experts_implementation)
            if self.disable_adapters or other_implementation or kwargs or len(args) != 2:
                return super().forward(x, *args, **kwargs)
            return _forward(self, x, *args)

    return RoutedParamWrapper


def _forward(wrapper: Any, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    experts: Experts = wrapper.get_base_layer()
    adapted = [
        (level, adapter)
        for level in _nested(wrapper)
        for adapter in level.active_adapters
        if adapter in level.lora_A and not level.merged
    ]
    if not adapted:
        return experts(x_ND, expert_ids_NK, weights_NK)
    if mapped(expert_ids_NK):  # under vmap, which cannot say which were chosen: all of them
        chosen_U, ids_NK = torch.arange(experts.gate_up_proj.shape[0], device=x_ND.device), expert_ids_NK
    else:
        chosen_U, ids_NK = expert_ids_NK.unique(return_inverse=True)
    weights = {name: getattr(experts, name)[chosen_U] for name in ("gate_up_proj", "down_proj")}
    for level, adapter in adapted:
        name = level.parameter_name
        left, right, scaling = level.get_delta_factors(adapter)  # (E, out, r), (E, r, in): views, not copies
        with torch.autocast(x_ND.device.type, enabled=False):  # the sum keeps the weight's own dtype
            weights[name] = torch.baddbmm(weights[name], left[chosen_U], right[chosen_U], alpha=scaling)
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    return ops.moe(x_ND, weights_NK, ids_NK, gate_up, down, experts.activation, backend=experts.backend)


def _nested(wrapper: Any) -> Iterator[Any]:
    """The wrapper and those inside it, one for each adapted parameter."""
    while not isinstance(wrapper, Experts):
        yield wrapper
        wrapper = wrapper.base_layer
