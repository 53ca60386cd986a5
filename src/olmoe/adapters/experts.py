"""The experts of a layer with adapters, as one step of a training pass that keeps nothing but its inputs.

Experts are computed one at a time, forward and backward: the frozen matrices of one are decoded once in each pass, and
neither decoded matrices nor intermediate values of other experts exist at that time.

Shapes legend: N tokens, D hidden, E experts, K experts per token, M = N*K routed rows, F expert width, r rank; n rows
of one expert.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from olmoe import ops
from olmoe.model import Experts
from olmoe.ops import widened
from olmoe.ops.types import SortedRows
from olmoe.quant import PackedExperts
from olmoe.weights.names import DOWN, GATE_UP

# torch's products in bf16 are compiled for each number of rows, and kept: for every expert's own, a gigabyte of them.
PADDED = 16


class _Recomputation(threading.local):
    unneeded = False


_RECOMPUTATION = _Recomputation()


@contextlib.contextmanager
def outputs_unneeded() -> Iterator[None]:
    """A context for recomputing a layer only for its backward pass, which does not use its experts' outputs."""
    before = _RECOMPUTATION.unneeded
    try:
        _RECOMPUTATION.unneeded = True
        yield
    finally:
        _RECOMPUTATION.unneeded = before


class Low(NamedTuple):
    """The factors of an adapted stack, (E, r, C) and (E, R, r), and what their product is multiplied by."""

    a: Tensor
    b: Tensor
    scale: float

    def product(self, x: Tensor, e: int) -> Tensor:
        """What the adapter adds to the product with an expert's matrix. x (n, C) -> (n, R)."""
        return F.linear(F.linear(x, self.a[e]), self.b[e]) * self.scale


class FrozenExperts(NamedTuple):
    """Stacks of weights that are not trained, and the dtype of products with them; the results are fp32."""

    base: Experts | PackedExperts
    dtype: torch.dtype

    def matrix(self, name: str, e: int) -> Tensor:
        """One expert's matrix, (R, C), in a dtype that `product` and `transposed` take."""
        if isinstance(self.base, PackedExperts) and name in self.base.formats:
            return self.base.decode(name, self.dtype, e)
        plain: Tensor = getattr(self.base, name)[e]
        # In fp32 half precision is widened by the product.
        return plain if self.dtype == torch.float32 else plain.to(self.dtype)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x W^T. x (n, C) -> (n, R)."""
        return ops.linear(self._lowered(x), matrix, backend=self.base.backend)[: len(x)].float()

    def transposed(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x W. x (n, R) -> (n, C)."""
        if widened.is_mixed(x, matrix) and self.dtype == torch.float32:
            return widened.matmul(x, matrix)
        return ops.linear(self._lowered(x), matrix.T, backend=self.base.backend)[: len(x)].float()

    def _lowered(self, x: Tensor) -> Tensor:
        """`x` in the dtype of products; on a CPU with rows of zeros up to a multiple of `PADDED`."""
        if self.dtype == torch.float32 or x.device.type != "cpu":
            return x.to(self.dtype)
        return F.pad(x.to(self.dtype), (0, 0, 0, -len(x) % PADDED))


def adapted_experts(
    x_ND: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    frozen: FrozenExperts,
    adapters: Mapping[str, Low],
) -> Tensor:
    """`Experts.forward` with adapters by the names of their stacks, and gradients of the first order."""
    factors = [factor for low in adapters.values() for factor in (low.a, low.b)]
    scales = {name: low.scale for name, low in adapters.items()}
    y: Tensor = _AdaptedExperts.apply(x_ND, weights_NK, expert_ids_NK, frozen, scales, *factors)
    return y


class _AdaptedExperts(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        expert_ids_NK: Tensor,
        frozen: FrozenExperts,
        scales: dict[str, float],
        *factors: Tensor,
    ) -> Tensor:
        ctx.frozen, ctx.scales = frozen, scales
        ctx.save_for_backward(x_ND, weights_NK, expert_ids_NK, *factors)
        if _RECOMPUTATION.unneeded:
            return torch.zeros_like(x_ND)
        low, wide_ND = _adapters(scales, factors), x_ND.float()
        rows = ops.sort_by_expert(expert_ids_NK, frozen.base.num_experts, backend=frozen.base.backend)
        out_MD = wide_ND.new_empty(expert_ids_NK.numel(), x_ND.shape[1])
        for e, part in _parts(rows):
            x = wide_ND[rows.token_ids_M[part]]
            gate, up = _product(frozen, low, x, GATE_UP, e, frozen.matrix(GATE_UP, e)).chunk(2, dim=-1)
            h = frozen.base.activation(gate) * up
            out_MD[part] = _product(frozen, low, h, DOWN, e, frozen.matrix(DOWN, e))
        return ops.combine(out_MD, weights_NK, rows, backend=frozen.base.backend).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, expert_ids_NK, *factors = ctx.saved_tensors
        frozen: FrozenExperts = ctx.frozen
        low, wide_ND, grad_ND = _adapters(ctx.scales, factors), x_ND.float(), grad_ND.float()
        rows = ops.sort_by_expert(expert_ids_NK, frozen.base.num_experts, backend=frozen.base.backend)
        weights_M = weights_NK.float().flatten()[rows.order_M]
        grad_weights_M = torch.zeros_like(weights_M)
        grad_x_MD = wide_ND.new_empty(len(weights_M), x_ND.shape[1]) if ctx.needs_input_grad[0] else None
        grads = {name: _Gradients(each) for name, each in low.items()}
        for e, part in _parts(rows):
            tokens, weight = rows.token_ids_M[part], weights_M[part].unsqueeze(1)
            x, grad = wide_ND[tokens], grad_ND[tokens]
            gate_up = frozen.matrix(GATE_UP, e)
            gate, up = _product(frozen, low, x, GATE_UP, e, gate_up).chunk(2, dim=-1)
            activated, slope = _differentiable(frozen.base.activation, gate)
            h = activated * up
            # From the gradient of the unweighted output.
            grad_h = frozen.transposed(grad, frozen.matrix(DOWN, e))
            if DOWN in grads:
                grad_h += grads[DOWN].add(e, h, grad, weight)
            grad_weights_M[part] = torch.linalg.vecdot(grad_h, h)
            grad_h *= weight
            grad_gate_up = torch.cat((slope(grad_h * up), grad_h * activated), dim=-1)
            low_x = grads[GATE_UP].add(e, x, grad_gate_up) if GATE_UP in grads else None
            if grad_x_MD is not None:
                grad_x = frozen.transposed(grad_gate_up, gate_up)
                grad_x_MD[part] = grad_x if low_x is None else grad_x.add_(low_x)
        grad_x_ND = None if grad_x_MD is None else F.embedding_bag(rows.position_NK, grad_x_MD, mode="sum")
        grad_weights_NK = grad_weights_M[rows.position_NK].to(weights_NK.dtype)
        pairs = [value for each in grads.values() for value in (each.a, each.b)]
        return None if grad_x_ND is None else grad_x_ND.to(x_ND.dtype), grad_weights_NK, None, None, None, *pairs


class _Gradients:
    """The gradients of a stack's factors, filled expert by expert; experts that no token chose have none."""

    def __init__(self, low: Low) -> None:
        self.low, self.a, self.b = low, torch.zeros_like(low.a), torch.zeros_like(low.b)

    def add(self, e: int, x: Tensor, grad: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """Those of expert e from its inputs (n, C) and the gradient (n, R) of its outputs times `weight` (n, 1).

        Returns the unweighted gradient of the inputs.
        """
        a, b, scale = self.low.a[e], self.low.b[e], self.low.scale
        grad_low = (grad @ b) * scale  # (n, r)
        weighted = grad_low * weight
        self.a[e] = weighted.T @ x
        self.b[e] = grad.T @ (F.linear(x, a) * scale * weight)
        return grad_low @ a


def _adapters(scales: dict[str, float], factors: Any) -> dict[str, Low]:
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return {name: Low(a, b, scale) for (name, scale), (a, b) in zip(scales.items(), pairs, strict=True)}


def _parts(rows: SortedRows) -> Iterator[tuple[int, slice]]:
    """The experts that were chosen, each with its rows."""
    for e, (start, end) in enumerate(pairwise(rows.offsets_E.tolist())):
        if start < end:
            yield e, slice(start, end)


def _product(frozen: FrozenExperts, low: Mapping[str, Low], x: Tensor, name: str, e: int, matrix: Tensor) -> Tensor:
    y = frozen.product(x, matrix)
    return y.add_(low[name].product(x, e)) if name in low else y


def _differentiable(activation: Callable[[Tensor], Tensor], gate: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The activation of `gate`, and the function that takes a gradient back through it."""
    gate = gate.detach().requires_grad_()
    with torch.enable_grad():
        activated = activation(gate)
    return activated.detach(), lambda grad: torch.autograd.grad(activated, gate, grad)[0]
