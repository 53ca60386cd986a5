"""Products of fp32 tensors in bf16: inputs are rounded to it, sums are fp32, and so are results and gradients.

Everything between the products stays in fp32, so that training may use a CPU's bf16 instructions with weights, their
gradients and the optimizer in fp32.

oneDNN, which multiplies bf16 on CPUs, prepares a kernel for each shape it meets, at ten times the cost of one expert's
product; and experts have another number of rows at every step. So each expert's rows are followed by zeros up to a
multiple of `_step` rows: few shapes remain, which oneDNN remembers.

Shapes legend: N tokens, D hidden, E experts, K experts per token, M = N*K routed rows, P rows with padding, F expert
width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from olmoe.ops import composable, torch_fast
from olmoe.ops.dispatch import register
from olmoe.ops.reference import Activation
from olmoe.ops.reference import lowered_cross_entropy as plain_cross_entropy
from olmoe.ops.transforms import followed, mapped, plain_gradients, transformed

# Tokens whose logits exist at a time.
CROSS_ENTROPY_TOKENS = 512
# Rows of the gated unit at a time: 1024 x 64 numbers in fp32 stay in the second cache.
UNIT_NUMBERS = 2**17


class _Padded(NamedTuple):
    """Routed rows sorted by expert, each expert's followed by rows of zeros."""

    bounds: list[int]  # E+1 offsets
    token_ids_P: Tensor  # N for zeros
    position_NK: Tensor


def _step(rows: int, experts: int) -> int:
    """The number of rows that those of an expert are padded to a multiple of."""
    eighth = rows // (8 * experts)
    return min(max(16, 1 << eighth.bit_length()), 512)


def _padded(expert_ids_NK: Tensor, num_experts: int) -> _Padded:
    n, k = expert_ids_NK.shape
    rows = torch_fast.sort_by_expert(expert_ids_NK, num_experts)
    step = _step(n * k, num_experts)
    lengths_E = (rows.offsets_E.diff() + step - 1) // step * step
    padded_E = F.pad(lengths_E.cumsum(0), (1, 0))
    shift_E = padded_E[:-1] - rows.offsets_E[:-1]
    position_NK = rows.position_NK + shift_E[expert_ids_NK]
    bounds = padded_E.tolist()
    token_ids_P = torch.full((bounds[-1],), n, device=expert_ids_NK.device)
    token_ids_P[position_NK] = torch.arange(n, device=expert_ids_NK.device).unsqueeze(1)
    return _Padded(bounds, token_ids_P, position_NK)


def _rows(x: Tensor, dtype: torch.dtype, token_ids_P: Tensor) -> Tensor:
    """x (N, D) in `dtype`, by token; zeros for ids of N. -> (P, D)."""
    lowered = x.new_empty(x.shape[0] + 1, x.shape[1], dtype=dtype)
    lowered[:-1] = x
    lowered[-1] = 0
    return lowered.index_select(0, token_ids_P)


def _multiply(rows_PI: Tensor, weight_EIO: Tensor, bounds: list[int]) -> Tensor:
    """Each expert's rows times its weight. (P, I), (E, I, O) -> (P, O)."""
    out = rows_PI.new_empty(rows_PI.shape[0], weight_EIO.shape[2])
    for e, weight in enumerate(weight_EIO.unbind()):
        if bounds[e] < bounds[e + 1]:
            part = slice(bounds[e], bounds[e + 1])
            torch.mm(rows_PI[part], weight, out=out[part])
    return out


def _weight_gradient(grad_PO: Tensor, rows_PI: Tensor, bounds: list[int]) -> Tensor:
    """(P, O), (P, I) -> (E, O, I) in fp32."""
    out = rows_PI.new_zeros(len(bounds) - 1, grad_PO.shape[1], rows_PI.shape[1])
    for e, own in enumerate(out.unbind()):
        if bounds[e] < bounds[e + 1]:
            part = slice(bounds[e], bounds[e + 1])
            torch.mm(grad_PO[part].T, rows_PI[part], out=own)
    return out.float()


class _LoweredMoe(torch.autograd.Function):
    """Of a layer's tokens backward keeps both products' inputs in bf16 and computes the gated unit again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights_NK: Tensor,
        expert_ids_NK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        activation: Activation,
        dtype: torch.dtype,
    ) -> Tensor:
        padded = _padded(expert_ids_NK, gate_up.shape[0])
        rows_PD = _rows(x, dtype, padded.token_ids_P)
        low_gate_up, low_down = gate_up.to(dtype), down.to(dtype)
        gate_up_P2F = _multiply(rows_PD, low_gate_up.transpose(1, 2), padded.bounds)
        hidden_PF = rows_PD.new_empty(rows_PD.shape[0], down.shape[2])
        for unit, out in _parts(gate_up_P2F, hidden_PF):
            gate, up = unit.float().chunk(2, dim=-1)
            out.copy_(activation(gate) * up)
        out_PD = _multiply(hidden_PF, low_down.transpose(1, 2), padded.bounds)
        ctx.bounds, ctx.activation, ctx.dtype = padded.bounds, activation, dtype
        ctx.save_for_backward(
            x, weights_NK, expert_ids_NK, gate_up, down, padded.token_ids_P, padded.position_NK, rows_PD, gate_up_P2F,
            low_gate_up, low_down,
        )  # fmt: skip
        return F.embedding_bag(
            padded.position_NK, out_PD.float(), per_sample_weights=weights_NK.float(), mode="sum"
        ).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, weights_NK, expert_ids_NK, gate_up, down, token_ids_P, position_NK, rows_PD, gate_up_P2F, low_gate_up,
            low_down,
        ) = ctx.saved_tensors  # fmt: skip
        if followed(grad_ND):

            def plain(x: Tensor, weights_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
                return _composed(x, weights_NK, expert_ids_NK, gate_up, down, ctx.activation, ctx.dtype)

            needed = [n for i, n in enumerate(ctx.needs_input_grad[:5]) if i != 2]
            gx, gw, gg, gd = plain_gradients(plain, (x, weights_NK, gate_up, down), needed, grad_ND)
            return gx, gw, None, gg, gd, None, None
        bounds = ctx.bounds
        # Of what follows `down`, the weight of a row is taken last: <grad, down a> is <grad down, a>.
        grad_PD = _rows(grad_ND, ctx.dtype, token_ids_P)
        unweighted_PF = _multiply(grad_PD, low_down, bounds)
        weights_P = weights_NK.new_zeros(rows_PD.shape[0], dtype=torch.float32)
        weights_P[position_NK] = weights_NK.float()
        hidden_PF, grad_weights_P = torch.empty_like(unweighted_PF), torch.empty_like(weights_P)
        grad_P2F = torch.empty_like(gate_up_P2F)
        parts = (gate_up_P2F, unweighted_PF, weights_P.unsqueeze(1), hidden_PF, grad_weights_P.unsqueeze(1), grad_P2F)
        for unit, arriving, weight, hidden, grad_weight, grad in _parts(*parts):
            gate, up = unit.float().chunk(2, dim=-1)
            gate.requires_grad_()
            with torch.enable_grad():
                activated = ctx.activation(gate)
            arriving, gated = arriving.float(), activated.detach() * up
            torch.linalg.vecdot(arriving, gated, out=grad_weight.squeeze(1))
            hidden.copy_(gated.mul_(weight))
            arriving.mul_(weight)
            grad_gate, grad_up = grad.chunk(2, dim=-1)
            grad_up.copy_(arriving * activated.detach())
            grad_gate.copy_(torch.autograd.grad(activated, gate, arriving.mul_(up))[0])
        grad_down = _weight_gradient(grad_PD, hidden_PF, bounds)
        grad_gate_up = _weight_gradient(grad_P2F, rows_PD, bounds)
        grad_rows_PD = _multiply(grad_P2F, low_gate_up, bounds)
        grad_x = F.embedding_bag(position_NK, grad_rows_PD.float(), mode="sum").to(x.dtype)
        grad_weights_NK = grad_weights_P[position_NK].to(weights_NK.dtype)
        return grad_x, grad_weights_NK, None, grad_gate_up.to(gate_up.dtype), grad_down.to(down.dtype), None, None


def _parts(*tensors: Tensor) -> Any:
    """The rows of all these together, some at a time."""
    rows = max(1, UNIT_NUMBERS // tensors[0].shape[1])
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _composed(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    dtype: torch.dtype,
) -> Tensor:
    """The same of operations that run on every device and that can be followed."""
    gate_up, down = gate_up.to(dtype), down.to(dtype)
    if mapped(expert_ids_NK):
        return composable.moe(x.to(dtype), weights_NK, expert_ids_NK, gate_up, down, activation).to(x.dtype)
    rows = torch_fast.sort_by_expert(expert_ids_NK, gate_up.shape[0])
    gathered_MD = torch_fast.gather_rows(x.to(dtype), rows)
    out_MD = torch_fast.experts(gathered_MD, rows.offsets_E, gate_up, down, activation)
    return torch_fast.combine(out_MD.float(), weights_NK, rows).to(x.dtype)


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
    arguments = x, weights_NK, expert_ids_NK, gate_up, down, activation, dtype
    if x.device.type != "cpu" or is_compiling() or transformed() or x.shape[0] == 0:
        return _composed(*arguments)
    out: Tensor = _LoweredMoe.apply(*arguments)
    return out


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
    if transformed():
        return plain_cross_entropy(x, weight, labels, ignore_index, dtype)
    loss: Tensor = _LoweredCrossEntropy.apply(x, weight, labels, ignore_index, dtype)
    return loss
