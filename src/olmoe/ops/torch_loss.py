"""The loss of a language model over its head in torch's operations, of which all logits never exist at once.

Shapes legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmoe.ops import widened
from olmoe.ops.autocast import without_autocast
from olmoe.ops.cpu import training
from olmoe.ops.dispatch import register
from olmoe.ops.reference import linear_cross_entropy as plain_cross_entropy
from olmoe.ops.transforms import plain_gradients, transformed

# Tokens whose logits exist at a time in linear_cross_entropy: 512 x 4096 fp32 are 8 MB.
CROSS_ENTROPY_TOKENS = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over parts of tokens, so that (N, V) logits never exist.

    The gradient of a sum needs only the parts' own softmax, so it is computed with the loss and scaled
    by the incoming gradient in backward. A gradient that is to be differentiated is that of the plain formula.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        # A frozen one is widened in parts where memory is scarce.
        wide_weight = weight if weight.is_cpu and not need_weight else weight.float()
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(wide_weight) if need_weight else None
        for start in range(0, x.shape[0], CROSS_ENTROPY_TOKENS):
            part = slice(start, start + CROSS_ENTROPY_TOKENS)
            x_part, label = x[part].float(), labels[part]
            used = label != ignore_index
            target = label.where(used, 0).unsqueeze(1)
            logits = widened.matmul_transposed(x_part, wide_weight)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            loss += ((lse - logits.gather(1, target)).squeeze(1) * used).sum()
            if need_x or need_weight:
                delta = logits.sub_(lse).exp_()  # softmax, in place of the logits
                delta.scatter_add_(1, target, torch.full_like(target, -1, dtype=delta.dtype))
                delta *= used.unsqueeze(1)
                if grad_x is not None:
                    grad_x[part] = widened.matmul(delta, wide_weight)
                if grad_weight is not None:
                    grad_weight.addmm_(delta.T, x_part)
        ctx.ignore_index = ignore_index
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), x, weight, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, x, weight, labels = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, weight: Tensor) -> Tensor:
                return plain_cross_entropy(x, weight, labels, ctx.ignore_index)

            with without_autocast(x):
                return (*plain_gradients(plain, (x, weight), ctx.needs_input_grad[:2], grad), None, None)
        return (
            None if grad_x is None else (grad_x * grad).to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad).to(grad_weight.dtype),
            None,
            None,
        )


@register("linear_cross_entropy", "torch")
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """See `reference.linear_cross_entropy`."""
    if transformed():
        return plain_cross_entropy(x, weight, labels, ignore_index)
    if training.takes(x, weight, labels):

        def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return plain_cross_entropy(x, weight, labels, ignore_index)

        return training.linear_cross_entropy(x, weight, labels, ignore_index, plain)
    return _LinearCrossEntropy.apply(x, weight, labels, ignore_index)
