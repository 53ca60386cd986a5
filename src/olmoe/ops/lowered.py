"""Products of fp32 tensors in bf16: inputs are rounded to it, sums are fp32, and so are results and gradients.

Everything between the products stays in fp32, so that training may use a CPU's bf16 instructions with weights, their
gradients and the optimizer in fp32. On CPUs with such instructions the C++ kernels compute it, as they do in fp32.
Elsewhere (GPUs, compiled models, transforms that must follow each step) operations on tensors of bf16 do; of these
the results of products are rounded, too, before they become fp32 again.

Shapes legend: B batch, T sequence, H heads, G KV heads, Dh head dim, N tokens, D hidden, K experts per token,
M = N*K routed rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe.ops import composable, torch_fast
from olmoe.ops.cpu import causal as causal_kernels
from olmoe.ops.cpu import training
from olmoe.ops.dispatch import register
from olmoe.ops.reference import Activation
from olmoe.ops.reference import lowered_cross_entropy as plain_cross_entropy
from olmoe.ops.transforms import mapped, plain_gradients, transformed

# Tokens whose logits exist at a time.
CROSS_ENTROPY_TOKENS = 512


@register("lowered_linear", "torch")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.lowered_linear`."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch_fast.linear(x.to(dtype), weight.to(dtype), None).to(x.dtype)
        return y if bias is None else y + bias

    if training.takes_products(dtype, x, weight, bias):
        return training.linear(x, weight, bias, plain, dtype)
    return plain(x, weight, bias)


@register("lowered_attention", "torch")
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> Tensor:
    """See `reference.lowered_attention`."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch_fast.attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal).to(q.dtype)

    if causal and mask is None and training.takes_products(dtype, q, k, v) and causal_kernels.fits(q, k, v):
        return causal_kernels.attention(q, k, v, plain, dtype)
    return plain(q, k, v)


@register("lowered_moe", "torch")
def moe(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.lowered_moe`."""

    def plain(x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        if mapped(expert_ids_NK):
            return composable.moe(x.to(dtype), weights_NK, expert_ids_NK, gate_up, down, activation).to(x.dtype)
        rows = torch_fast.sort_by_expert(expert_ids_NK, gate_up.shape[0])
        gathered_MD = torch_fast.gather_rows(x.to(dtype), rows)
        out_MD = torch_fast.experts(gathered_MD, rows.offsets_E, gate_up, down, activation)
        return torch_fast.combine(out_MD.float(), weights_NK, rows).to(x.dtype)

    if activation is F.silu and training.takes_products(dtype, x, weights_NK, gate_up, down, indices=expert_ids_NK):
        return training.moe(x, weights_NK, expert_ids_NK, gate_up, down, plain, dtype)
    return plain(x, weights_NK, expert_ids_NK, gate_up, down)


class _LoweredCrossEntropy(torch.autograd.Function):
    """As in `torch_fast`, loss and both gradients in one pass over parts of tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        low_x, low_weight = x.to(dtype), weight.to(dtype)
        # The scores themselves stay in fp32: a score of 16 rounded to bf16 is off by up to 3 %, as a probability.
        rounded_x, rounded_weight = low_x.float(), low_weight.float()
        grad_x = torch.empty_like(low_x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, x.shape[0], CROSS_ENTROPY_TOKENS):
            part = slice(start, start + CROSS_ENTROPY_TOKENS)
            label = labels[part]
            used = label != ignore_index
            target = label.where(used, 0).unsqueeze(1)
            scores = torch.log_softmax(rounded_x[part] @ rounded_weight.T, dim=-1)
            loss -= (scores.gather(1, target).squeeze(1) * used).sum()
            if need_x or need_weight:
                delta = scores.exp_()
                delta.scatter_add_(1, target, torch.full_like(target, -1, dtype=delta.dtype))
                delta *= used.unsqueeze(1)
                low_delta = delta.to(dtype)
                if grad_x is not None:
                    torch.mm(low_delta, low_weight, out=grad_x[part])
                if grad_weight is not None:
                    grad_weight += low_delta.T @ low_x[part]
        ctx.ignore_index, ctx.dtype = ignore_index, dtype
        ctx.save_for_backward(grad_x, grad_weight, x, weight, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, x, weight, labels = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, weight: Tensor) -> Tensor:
                return plain_cross_entropy(x, weight, labels, ctx.ignore_index, ctx.dtype)

            return (*plain_gradients(plain, (x, weight), ctx.needs_input_grad[:2], grad), None, None, None)
        return (
            None if grad_x is None else grad_x.float().mul_(grad).to(x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight.dtype),
            None,
            None,
            None,
        )


@register("lowered_cross_entropy", "torch")
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """See `reference.lowered_cross_entropy`."""

    def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain_cross_entropy(x, weight, labels, ignore_index, dtype)

    if transformed():
        return plain(x, weight, labels)
    if training.takes_products(dtype, x, weight, indices=labels):
        return training.linear_cross_entropy(x, weight, labels, ignore_index, plain, dtype)
    loss: Tensor = _LoweredCrossEntropy.apply(x, weight, labels, ignore_index, dtype)
    return loss
