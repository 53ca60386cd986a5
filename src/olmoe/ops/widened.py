"""Products in fp32 with weights that stay in half precision: rows of them are widened as they are needed.

For CPUs that multiply half precision slowly, and for frozen weights, whose fp32 copy would take much memory.

Shapes legend: N tokens, R rows (outputs) and C columns (inputs) of a weight; of experts as in `torch_fast`.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from olmoe.ops.autocast import autocast_dtype
from olmoe.ops.reference import Activation
from olmoe.ops.transforms import followed, transformed
from olmoe.runtime import outside_inference_mode

# Rows of a weight converted to fp32 at a time: 256 x 2048 fp32 are 2 MB, which stay in the L2/L3 cache.
CONVERT_ROWS = 256


class _Scratch(threading.local):
    """A thread's buffer for converted parts. A new one for each product would cause page faults every time."""

    buffer: Tensor | None = None

    def rows(self, count: int, width: int) -> Tensor:
        """An fp32 (count, width) view of the buffer, whose values are arbitrary."""
        if self.buffer is None or self.buffer.numel() < count * width:
            # Outside inference mode, so that the buffer can be written in any mode afterwards.
            with outside_inference_mode():
                self.buffer = torch.empty(count * width, dtype=torch.float32)
        return self.buffer[: count * width].view(count, width)


_SCRATCH = _Scratch()


def matmul_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32, x (N, C) fp32 -> (N, R), converting `CONVERT_ROWS` rows of a half-precision weight at a time."""
    if weight.dtype == torch.float32 or weight.device.type != "cpu":
        return x @ weight.float().T
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    buffer = _SCRATCH.rows(min(CONVERT_ROWS, weight.shape[0]), weight.shape[1])
    for start in range(0, weight.shape[0], CONVERT_ROWS):
        part = weight[start : start + CONVERT_ROWS]
        wide = buffer[: part.shape[0]].copy_(part)
        torch.mm(x, wide.T, out=out[:, start : start + CONVERT_ROWS])
    return out


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x W in fp32, x (N, R) fp32 -> (N, C), in the same way."""
    if weight.dtype == torch.float32 or weight.device.type != "cpu":
        return x @ weight.float()
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float32)
    buffer = _SCRATCH.rows(min(CONVERT_ROWS, weight.shape[0]), weight.shape[1])
    for start in range(0, weight.shape[0], CONVERT_ROWS):
        part = weight[start : start + CONVERT_ROWS]
        out.addmm_(x[:, start : start + CONVERT_ROWS], buffer[: part.shape[0]].copy_(part))
    return out


def is_mixed(x: Tensor, weight: Tensor) -> bool:
    """Whether fp32 inputs are multiplied by a half-precision weight, which must then be widened."""
    return x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16) and autocast_dtype(x) is None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ops.linear` for inputs and a weight that are mixed. The backward pass keeps the weight as it is."""
    if is_compiling() or transformed(x) or weight.requires_grad:
        return F.linear(x, weight.float(), None if bias is None else bias.float())
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _Frozen.apply(rows, weight) if x.requires_grad else matmul_transposed(rows, weight)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.float()


def experts(rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """`ops.experts` for mixed rows and weights: the experts that have rows, one at a time."""
    parts = []
    for e, (start, end) in enumerate(pairwise(offsets_E.tolist())):
        if start < end:
            gate, up = linear(rows_MD[start:end], gate_up[e], None).chunk(2, dim=-1)
            parts.append(linear(activation(gate) * up, down[e], None))
    return torch.cat(parts) if parts else rows_MD


class _Frozen(torch.autograd.Function):
    """x W^T with a gradient for x, which is fp32, and none for W, which is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return matmul_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (grad @ weight.float() if followed(grad) else matmul(grad, weight)), None
