"""The gated unit of experts in torch's operations, with any activation.

Shapes legend: M routed rows, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmoe.ops import composable
from olmoe.ops.reference import Activation
from olmoe.ops.transforms import followed


def gated_unit(gate_up_M2F: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up of (M, 2F) -> (M, F)."""
    out: Tensor = _GatedUnit.apply(gate_up_M2F, activation)
    return out


class _GatedUnit(torch.autograd.Function):
    """act(gate) * up of (M, 2F) -> (M, F); backward writes both halves of the gradient into one buffer."""

    @staticmethod
    def forward(ctx: Any, gate_up_M2F: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_up_M2F)
        ctx.activation = activation
        gate, up = gate_up_M2F.chunk(2, dim=-1)
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor, None]:
        (gate_up_M2F,) = ctx.saved_tensors
        if followed(grad_MF):
            return composable.gated_unit_gradient(grad_MF, gate_up_M2F, ctx.activation), None
        gate, up = gate_up_M2F.chunk(2, dim=-1)
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            activated = ctx.activation(gate)
        grad = torch.empty_like(gate_up_M2F)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grad_MF, activated.detach(), out=grad_up)
        grad_gate.copy_(torch.autograd.grad(activated, gate, grad_MF * up)[0])
        return grad, None
