"""Modules that keep their matrices packed and decode them one at a time, when they multiply.

They have the call signatures of the network's `Linear` and `Experts`. Gradients flow through them to their
inputs (adapters, QLoRA) but not into packed weights, and backward decodes again instead of keeping decoded
matrices alive.

A matrix called `weight` is stored as parameters `weight` (its codes), `weight_absmax` and so on; the matrices of
a stack of experts have a leading dimension E.

Shapes legend: N tokens, D hidden, E experts, K experts per token, M = N*K routed rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from olmoe import ops
from olmoe.quant.formats import CODES, Format


class PackedModule(nn.Module):
    """What packed modules share: parameters for the parts of each matrix, and the way to and from them.

    `compute_dtype` is the dtype that products are computed in, by default that of the input.
    """

    backend = ops.AUTO

    def __init__(self, format: Format, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.format, self.compute_dtype = format, compute_dtype
        self.shapes: dict[str, tuple[int, int]] = {}  # of each packed matrix (of one expert's, in a stack)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading dimensions of every packed matrix: (E,) for experts, none otherwise."""
        return ()

    def add(self, name: str, rows: int, columns: int) -> None:
        """Reserve parameters for the matrix `name`, or for a stack of matrices of that shape."""
        self.shapes[name] = (rows, columns)
        for part, (shape, dtype) in self.format.parts(rows, columns).items():
            value = torch.empty(*self.stack, *shape, dtype=dtype)
            self.register_parameter(_parameter_name(name, part), nn.Parameter(value, requires_grad=False))

    def encode(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The parameters, by their names, that hold `weight`: (R, C), or a stack (E, R, C) expert by expert."""
        if weight.dim() == 2:
            return {_parameter_name(name, part): value for part, value in self.format.encode(weight).items()}
        stacked: dict[str, Tensor] = {}
        for e, matrix in enumerate(weight):
            for part, value in self.format.encode(matrix).items():
                key = _parameter_name(name, part)
                if key not in stacked:
                    stacked[key] = value.new_empty(weight.shape[0], *value.shape)
                stacked[key][e] = value
        return stacked

    def pack(self, name: str, weight: Tensor) -> None:
        """Encode `weight` into the parameters of the matrix `name`."""
        for key, value in self.encode(name, weight).items():
            setattr(self, key, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def decode(self, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The matrix `name` in `dtype`; of a stack that of one `expert`."""
        rows, columns = self.shapes[name]
        parts = {part: getattr(self, _parameter_name(name, part)) for part in self.format.parts(rows, columns)}
        if expert is not None:
            parts = {part: value[expert] for part, value in parts.items()}
        return self.format.decode(parts, rows, columns, dtype)

    def product(self, x: Tensor, name: str, expert: int | None = None) -> Tensor:
        """x times the transpose of the decoded matrix, in x's dtype. x (..., C) -> (..., R)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return ops.linear(x, self.decode(name, x.dtype, expert), backend=self.backend)
        return _Product.apply(x, self, name, expert)

    def extra_repr(self) -> str:
        """Format and shapes, for printed models."""
        shapes = ", ".join(f"{name} {rows}x{columns}" for name, (rows, columns) in self.shapes.items())
        return f"{self.format.name}, {shapes}, compute_dtype={self.compute_dtype}"


def _parameter_name(name: str, part: str) -> str:
    """The codes take the matrix's own name, as loaders look for it; the rest append theirs."""
    return name if part == CODES else f"{name}_{part}"


class _Product(torch.autograd.Function):
    """`PackedModule.product` with a gradient for x, which decodes the matrix a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedModule, name: str, expert: int | None) -> Tensor:
        ctx.source = (module, name, expert)
        return ops.linear(x, module.decode(name, x.dtype, expert), backend=module.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        module, name, expert = ctx.source
        return ops.linear(grad, module.decode(name, grad.dtype, expert).T, backend=module.backend), None, None, None


class PackedLinear(PackedModule, nn.Linear):
    """`Linear` with a packed weight; a bias stays as it is. An `nn.Linear`, so that adapters recognise it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight unpacked
        self.format, self.compute_dtype, self.shapes = format, compute_dtype, {}
        self.in_features, self.out_features = in_features, out_features
        self.add("weight", out_features, in_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        wide = x.to(self.compute_dtype or x.dtype)
        y = self.product(wide, "weight")
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class PackedExperts(PackedModule):
    """`Experts` with packed weights: decodes the experts that tokens chose, one at a time, and no others."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor],
        format: Format,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(format, compute_dtype)
        self.num_experts, self.activation = num_experts, activation
        self.add("gate_up_proj", 2 * intermediate_size, hidden_size)
        self.add("down_proj", hidden_size, intermediate_size)

    @property
    def stack(self) -> tuple[int, ...]:
        """See `PackedModule.stack`."""
        return (self.num_experts,)

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D) in x's dtype."""
        rows = ops.sort_by_expert(expert_ids_NK, self.num_experts, backend=self.backend)
        x_MD = ops.gather_rows(x_ND.to(self.compute_dtype or x_ND.dtype), rows, backend=self.backend)
        offsets, pieces = rows.offsets_E.tolist(), []
        for e, (start, end) in enumerate(pairwise(offsets)):
            if start < end:
                gate, up = self.product(x_MD[start:end], "gate_up_proj", e).chunk(2, dim=-1)
                pieces.append(self.product(self.activation(gate) * up, "down_proj", e))
        out_MD = torch.cat(pieces) if pieces else x_MD
        return ops.combine(out_MD, weights_NK, rows, backend=self.backend).to(x_ND.dtype)
