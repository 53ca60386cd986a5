"""PEFT's LoRA on routed experts, computed only for the experts that tokens chose.

PEFT wraps the experts once for each parameter named in `target_parameters`, and in every forward pass adds the
low-rank product to the whole stack, whatever the router chose: a decoding step then reads and writes all E experts
instead of K. Here the sum is formed for the chosen ones.

Shapes legend: N tokens, D hidden, E experts, K experts per token, U distinct experts chosen, F expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe import ops
from olmoe.hf.experts import OlmoeExperts
from olmoe.hf.view import view_as
from olmoe.model import Experts
from olmoe.ops.transforms import mapped
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLinear

_STACKS = ("gate_up_proj", "down_proj")


def route_lora(layers: nn.ModuleList) -> None:
    """Make PEFT's wrappers around the experts of `layers` compute only the chosen experts.

    The wrappers keep their parameters, names and methods, so PEFT itself saves, merges and switches adapters.
    Experts that PEFT did not wrap are left alone, and so is everything while a graph is compiled.
    """
    if torch.compiler.is_compiling():
        return
    for layer in layers:
        mlp: Any = getattr(layer, "mlp", None)
        experts: Any = getattr(mlp, "experts", None)
        if isinstance(experts, Experts) or not hasattr(experts, "parameter_name"):
            continue
        if type(experts.get_base_layer()) is OlmoeExperts and hasattr(
            experts, "get_delta_factors"
        ):  # PEFT 0.21 and later
            mlp.experts = routed_wrapper(experts)


def routed_wrapper(wrapper: Any) -> Any:
    """The replacement of one of PEFT's wrappers, if it is LoRA around a parameter; else the wrapper itself."""
    from peft.tuners.lora.layer import ParamWrapper

    return view_as(_routed_wrapper(ParamWrapper), wrapper) if type(wrapper) is ParamWrapper else wrapper


@functools.cache
def _routed_wrapper(wrapper: Any) -> type:
    """A subclass of PEFT's wrapper with its own forward pass. (PEFT is optional, so it is made on demand.)"""

    class RoutedParamWrapper(wrapper):
        """`lora.ParamWrapper` around experts, the outermost of the nested ones, or around another packed matrix."""

        @property  # type: ignore[misc]
        def __class__(self) -> type:
            """PEFT's class, which PEFT checks when it adds a second adapter."""
            return wrapper

        def __reduce_ex__(self, protocol: Any) -> Any:
            """For copies and pickles, which cannot find a class made on demand."""
            return _new_routed_wrapper, (), self.__dict__

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            """x (N, D), expert ids and weights (N, K) -> (N, D)."""
            base = self.get_base_layer()
            if self.disable_adapters or kwargs:
                return super().forward(x, *args, **kwargs)
            if isinstance(base, PackedLinear | PackedEmbedding):
                return _packed_forward(self, x)
            if len(args) != 2 or not _computes_itself(base):
                return super().forward(x, *args)
            return _forward(self, x, *args)

    return RoutedParamWrapper


def _new_routed_wrapper() -> Any:
    from peft.tuners.lora.layer import ParamWrapper

    kind: Any = _routed_wrapper(ParamWrapper)
    return kind.__new__(kind)


def _computes_itself(base: Any) -> bool:
    """Whether `base` are experts that we compute; other implementations are requested by name."""
    return isinstance(base, PackedExperts) or (type(base) is OlmoeExperts and base.computes_itself())


def _forward(wrapper: Any, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    experts, adapted = wrapper.get_base_layer(), _active(wrapper)
    if not adapted:
        return experts(x_ND, expert_ids_NK, weights_NK)
    every = mapped(expert_ids_NK)  # under vmap, the chosen experts cannot be known
    if not isinstance(experts, PackedExperts):
        stacks, backend = [experts.gate_up_proj, experts.down_proj], experts.fitting_backend()
    elif every:
        dtype, backend = experts.compute_dtype or x_ND.dtype, experts.backend
        stacks = [experts.whole(name, dtype) for name in _STACKS]
    else:
        return experts.routed(x_ND, expert_ids_NK, weights_NK, _added(experts, adapted))
    if every:
        chosen_U, ids_NK = torch.arange(experts.num_experts, device=x_ND.device), expert_ids_NK
    else:
        chosen_U, ids_NK = expert_ids_NK.unique(return_inverse=True)
    weights = {name: stack[chosen_U] for name, stack in zip(_STACKS, stacks, strict=True)}
    for level, adapter in adapted:
        name = level.parameter_name
        left, right, scaling = level.get_delta_factors(adapter)  # (E, out, r), (E, r, in): views, not copies
        left, right = (factor[chosen_U].to(weights[name].dtype) for factor in (left, right))
        with torch.autocast(x_ND.device.type, enabled=False):  # the sum keeps the weight's own dtype
            weights[name] = torch.baddbmm(weights[name], left, right, alpha=scaling)
    gate_up, down = weights.values()
    x = x_ND.to(stacks[0].dtype) if isinstance(experts, PackedExperts) else x_ND
    out_ND = ops.moe(x, weights_NK, ids_NK, gate_up, down, experts.activation, backend=backend)
    return out_ND.to(x_ND.dtype) if isinstance(experts, PackedExperts) else out_ND


def _added(experts: PackedExperts, adapted: list[tuple[Any, str]]) -> Callable[[Tensor, str, int], Tensor]:
    """Products with one expert's packed matrix and with what the adapters add to it, in their own dtype."""
    factors: dict[str, list[tuple[Sequence[Tensor], Sequence[Tensor], float]]] = {}
    for level, adapter in adapted:
        e, a, b = level.num_experts, level.lora_A[adapter].weight, level.lora_B[adapter].weight
        # Unbound once: indexing each expert would make a gradient as large as all of them every time.
        right, left = a.view(e, -1, a.shape[-1]).unbind(), b.view(b.shape[0], -1, e).unbind(-1)
        factors.setdefault(level.parameter_name, []).append((left, right, level.scaling[adapter]))

    def product(x: Tensor, name: str, e: int) -> Tensor:
        y = experts.fastest_product(x, name, e)
        for left, right, scaling in factors.get(name, ()):
            low = F.linear(F.linear(x.to(right[e].dtype), right[e]), left[e])
            y = y + (low * scaling).to(y.dtype)
        return y

    return product


def _packed_forward(wrapper: Any, x: Tensor) -> Tensor:
    """A packed matrix that was named as a parameter: x (..., in) or ids (...) -> (..., out)."""
    base = wrapper.get_base_layer()
    y: Tensor = base(x)
    for level, adapter in _active(wrapper):
        right, left = level.lora_A[adapter].weight, level.lora_B[adapter].weight  # (r, in), (out, r)
        if isinstance(base, PackedEmbedding):
            low = F.linear(F.embedding(x, left), right.T)
        else:
            low = F.linear(F.linear(x.to(right.dtype), right), left)
        y = y + (low * level.scaling[adapter]).to(y.dtype)
    return y


def _active(wrapper: Any) -> list[tuple[Any, str]]:
    """The active adapters: wrappers with the names of their adapters."""
    return [
        (level, adapter)
        for level in _nested(wrapper)
        for adapter in level.active_adapters
        if adapter in level.lora_A and not level.merged
    ]


def _nested(wrapper: Any) -> Iterator[Any]:
    """The wrapper and those inside it, one for each adapted parameter."""
    while hasattr(wrapper, "base_layer"):
        yield wrapper
        wrapper = wrapper.base_layer
