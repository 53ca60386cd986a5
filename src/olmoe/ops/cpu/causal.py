"""Causal attention in the C++ kernels for training, forward and backward: whole sequences, without a mask.

Probabilities are not kept: backward computes them again from the logarithms of their sums. See `training`, of which
this is the part for attention.

Shapes legend: B batch, T sequence, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from olmoe.ops.cpu.extension import kernels
from olmoe.ops.cpu.training import Plain, followed_gradients, numbers_of, room, shared_kernels
from olmoe.ops.transforms import followed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plain: Plain,
    products: torch.dtype | None = None,
    lengths: Sequence[int] = (),
) -> Tensor:
    """See `ops.attention`, causal and without a mask, for tensors that `fits`.

    With `lengths`, which must add up to T, texts of these lengths lie end to end in the only example (B = 1), and each
    sees itself alone.
    """
    out: Tensor = _Attention.apply(q, k, v, plain, products, lengths)
    return out


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` computes with these shapes: queries of every token that there are keys of."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        return False
    batch, heads, tokens, head_dim = q.shape
    alike = k.shape == (batch, k.shape[1], tokens, head_dim) and heads % k.shape[1] == 0
    return alike and head_dim <= kernels().largest_head


def _heads(t: Tensor) -> Any:
    """Where the kernels find the rows of t (B, H, T, Dh)."""
    return kernels().HeadRows(t.data_ptr(), *t.stride()[:3])


def _with_rows(t: Tensor) -> Tensor:
    """`t`, or a copy, whose rows (the last dimension) are contiguous."""
    t = t.detach()
    return t if t.stride(-1) == 1 else t.contiguous()


def _room_for_heads(like: Tensor) -> Tensor:
    """Memory of that shape (B, H, T, Dh) in which heads of a token follow each other, as projections read them."""
    batch, heads, tokens, head_dim = like.shape
    return room(batch, tokens, heads, head_dim).transpose(1, 2)


@torch.library.custom_op("olmoe::causal_attention", mutates_args=())
def _causal_attention(q: Tensor, k: Tensor, v: Tensor, lowered: bool, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The output, and what backward needs of sums of exponentials (B, H, T).

    As an operator of torch, so that selective checkpointing can keep what it returns.
    """
    q, k, v = (_with_rows(t) for t in (q, k, v))
    out, sums = _room_for_heads(q), room(*q.shape[:3])
    shared_kernels().causal_forward(
        numbers_of(torch.bfloat16 if lowered else None),
        _attention_shape(q, k, lengths),
        *(_heads(t) for t in (q, k, v, out)),
        sums.data_ptr(),
    )
    return out, sums


def _attention_shape(q: Tensor, k: Tensor, lengths: Sequence[int]) -> Any:
    batch, heads, tokens, head_dim = q.shape
    return kernels().AttentionShape(batch, heads, k.shape[1], tokens, head_dim, list(lengths))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plain: Plain,
        products: torch.dtype | None,
        lengths: Sequence[int],
    ) -> Tensor:
        out, sums = _causal_attention(q, k, v, products is not None, lengths)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.plain, ctx.products, ctx.lengths = plain, products, lengths
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        if followed(grad):
            return (*followed_gradients(ctx, (q, k, v), grad), None, None, None)
        inputs = [_with_rows(t) for t in (q, k, v)]
        gradients = [_room_for_heads(t) for t in (q, k, v)]
        gradient, shape = _with_rows(grad), _attention_shape(q, k, ctx.lengths)
        shared_kernels().causal_backward(
            numbers_of(ctx.products),
            shape,
            *(_heads(t) for t in (*inputs, out.detach())),
            sums.data_ptr(),
            *(_heads(t) for t in (gradient, *gradients)),
        )
        wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None)
