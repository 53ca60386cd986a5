"""Transforms that trace single operations: those of `torch.func`, forward-mode and second derivatives.

Our autograd functions, and kernels that write into memory, are opaque to these. Operations check here whether to run
as plain tensor code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is active, or wraps one of `tensors`.

    In a backward pass for many gradients at once (`is_grads_batched`) only the gradient shows it.
    """
    if is_compiling():
        return False
    functions: Any = torch._C
    if functions._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    wrapped, batched = functions._functorch.is_functorch_wrapped_tensor, functions._functorch.is_legacy_batchedtensor
    return any(t is not None and (wrapped(t) or batched(t)) for t in tensors)


def observed() -> bool:
    """Whether a mode sees every operation on tensors: tracers, counters of flops, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


def only_checkpointed() -> bool:
    """Whether the modes that see every operation are those of selective checkpointing, which computes some again."""
    modes = _get_current_dispatch_mode_stack()
    return all(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)


def mapped(t: Tensor) -> bool:
    """Whether `vmap` gives `t` a value for each example, so that no number in it can be read."""
    if is_compiling():
        return False
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def followed(gradient: Tensor) -> bool:
    """Whether a backward pass that was given `gradient` is itself followed, to be differentiated or mapped."""
    return torch.is_grad_enabled() or transformed(gradient)


def plain_attention() -> AbstractContextManager[None]:
    """A context in which `scaled_dot_product_attention` is computed by products and a softmax."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def twice_differentiable(function: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, for fused functions whose own gradients torch cannot differentiate.

    Where gradients are to be differentiated (`create_graph`), those of `plain(*inputs)`, the same function in plain
    operations, are taken; otherwise nothing is computed, and no memory held, beyond what `function` does itself.
    """
    if transformed():
        return plain(*inputs)
    if is_compiling() or not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return function(*inputs)
    incoming: list[Tensor] = []
    out: Tensor = _Outgoing.apply(function(*_Ingoing.apply(plain, incoming, *inputs)), incoming)
    return out


class _Ingoing(torch.autograd.Function):
    """Passes inputs on; in a backward pass that is to be differentiated it replaces their gradients."""

    @staticmethod
    def forward(ctx: Any, plain: Callable[..., Tensor], incoming: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.plain, ctx.incoming = plain, incoming
        ctx.save_for_backward(*inputs)
        return tuple(t.view_as(t) for t in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() or not ctx.incoming:
            return (None, None, *gradients)
        return (
            None,
            None,
            *plain_gradients(ctx.plain, ctx.saved_tensors, ctx.needs_input_grad[2:], ctx.incoming.pop()),
        )


class _Outgoing(torch.autograd.Function):
    """Passes an output on, and leaves its gradient to `_Ingoing` where that needs it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, incoming: list[Tensor]) -> Tensor:
        ctx.incoming = incoming
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            ctx.incoming[:] = [gradient]
        return gradient, None


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)` for the inputs that are `wanted`, with their graph where it is followed."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one input may follow from another, as the weights of experts do from their inputs: what comes
        # that way is not this function's.
        own = [t.view_as(t) if needed else t for t, needed in zip(inputs, wanted, strict=True)]
        out = function(*own)
    chosen = [t for t, needed in zip(own, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(out, chosen, gradient, create_graph=again))
    return [next(found) if needed else None for needed in wanted]
