"""Modules that keep their matrices packed and decode them one at a time when they multiply.

They have the call signatures of the network's `Linear`, of its `Experts`, and of `nn.Embedding`. Gradients flow
through them to their inputs (adapters, QLoRA) but not into packed weights, and backward decodes again instead of
keeping decoded matrices alive.

A matrix called `weight` is stored as parameters `weight` (its codes), `weight_absmax` and so on; the matrices of
a stack of experts have a leading dimension E. Every matrix of a module has its own format; one of the two stacks of
experts may also stay plain.

Shapes legend: N tokens, D hidden, E experts, K experts per token, M = N*K routed rows, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe import ops
from olmoe.errors import BackendUnavailableError
from olmoe.model import Experts
from olmoe.ops.activation import plain_activation
from olmoe.ops.cpu import packed as cpu
from olmoe.ops.transforms import mapped, transformed
from olmoe.quant.formats import CODES, Format
from olmoe.runtime import no_grad


class PackedModule(nn.Module):
    """What packed modules share: parameters for the parts of each matrix, and encoding and decoding.

    `compute_dtype` is the dtype that products are computed in, by default that of the input.
    """

    backend = ops.AUTO
    # An unpacked parameter of the same model, whose dtype is that of weights that are read decoded.
    plain: tuple[nn.Parameter, ...] = ()

    compute_dtype: torch.dtype | None
    shapes: dict[str, tuple[int, int]]  # of each packed matrix (of one expert's, in a stack)
    formats: dict[str, Format]  # of each packed matrix

    def __init__(self, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        self._start(compute_dtype)

    def _start(self, compute_dtype: torch.dtype | None) -> None:
        self.compute_dtype, self.shapes, self.formats = compute_dtype, {}, {}

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading dimensions of every packed matrix: (E,) for experts, none otherwise."""
        return ()

    def add(self, name: str, format: Format, rows: int, columns: int) -> None:
        """Reserve parameters for the matrix `name`, or for a stack of matrices of that shape."""
        self.shapes[name], self.formats[name] = (rows, columns), format
        for part, (shape, dtype) in format.parts(rows, columns).items():
            value = torch.empty(*self.stack, *shape, dtype=dtype)
            self.register_parameter(part_name(name, part), nn.Parameter(value, requires_grad=False))

    def encode(self, name: str, weight: Tensor | Iterable[Tensor]) -> dict[str, Tensor]:
        """The parameters, by their names, that hold `weight`: (R, C), or of a stack the matrices of all experts."""
        format = self.formats[name]
        if not self.stack:
            assert isinstance(weight, Tensor)
            return {part_name(name, part): value for part, value in format.encode(weight).items()}
        stacked: dict[str, Tensor] = {}
        for e, matrix in enumerate(weight):
            for part, value in format.encode(matrix).items():
                key = part_name(name, part)
                if key not in stacked:
                    stacked[key] = value.new_empty(*self.stack, *value.shape)
                stacked[key][e] = value
        return stacked

    def pack(self, name: str, weight: Tensor | Iterable[Tensor]) -> None:
        """Encode `weight` into the parameters of the matrix `name`."""
        for key, value in self.encode(name, weight).items():
            setattr(self, key, nn.Parameter(value, requires_grad=False))

    @no_grad
    def decode(self, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The matrix `name` in `dtype`; for a stack, that of one `expert`."""
        return self.formats[name].decode(self.parts(name, expert), *self.shapes[name], dtype)

    def parts(self, name: str, expert: int | None = None) -> dict[str, Tensor]:
        """The stored parts of the matrix `name`; for a stack, those of one `expert`. Views of the parameters."""
        parts = {part: self.get_stored(part_name(name, part)) for part in self.formats[name].parts(*self.shapes[name])}
        return parts if expert is None else {part: value[expert] for part, value in parts.items()}

    def get_stored(self, name: str) -> Tensor:
        """The parameter `name` as it is stored, even if reading the attribute decodes it (`olmoe.hf.adapted`)."""
        stored = self._parameters[name]
        assert stored is not None
        return stored

    def product(self, x: Tensor, name: str, expert: int | None = None) -> Tensor:
        """x times the transpose of the decoded matrix, in x's dtype. x (..., C) -> (..., R)."""
        if name not in self.formats:  # a plain matrix beside a packed one
            plain = getattr(self, name) if expert is None else getattr(self, name)[expert]
            return ops.linear(x, plain.to(x.dtype), backend=self.backend)
        if transformed() or not (torch.is_grad_enabled() and x.requires_grad):
            return ops.linear(x, self.decode(name, x.dtype, expert), backend=self.backend)
        return _Product.apply(x, self, name, expert)

    def fastest_product(self, x: Tensor, name: str, expert: int) -> Tensor:
        """`product` with a matrix of a stack, by the C++ kernels if they support it."""
        if not self.kernels(x, name):
            return self.product(x, name, expert)
        return cpu.packed_linear(x, self.parts(name, expert)[CODES], self.formats[name].name, *self.shapes[name])

    def kernels(
        self, x: Tensor, *names: str, others: tuple[Tensor | None, ...] = (), unsupported_reason: str | None = None
    ) -> bool:
        """Whether the C++ kernels multiply `x` with the matrices `names` as they are stored.

        `others` are the other tensors that the result depends on; `unsupported_reason` is one that the caller knows.

        Raises `BackendUnavailableError` if they were requested but cannot.
        """
        if self.backend not in (ops.AUTO, "cpu"):
            return False
        reason = unsupported_reason or cpu.unsupported(x, *others)
        if reason is None and any(name not in self.formats for name in names):
            reason = "a matrix beside packed ones is plain"
        if reason is None and any(self.formats[name].name not in cpu.packed_formats() for name in names):
            reason = f"they multiply with {' and '.join(cpu.packed_formats())}, not {self.formats[names[0]].name}"
        if reason is not None and self.backend == "cpu":
            raise BackendUnavailableError(f"Backend 'cpu' cannot run {type(self).__name__} here: {reason}.")
        return reason is None

    def extra_repr(self) -> str:
        """Formats and shapes, for printed models."""
        shapes = ", ".join(f"{name} {r}x{c} {self.formats[name].name}" for name, (r, c) in self.shapes.items())
        return f"{shapes}, compute_dtype={self.compute_dtype}"


def part_name(name: str, part: str) -> str:
    """The name of a part of the matrix `name`: codes have its own name, as loaders expect, others append theirs."""
    return name if part == CODES else f"{name}_{part}"


class _Product(torch.autograd.Function):
    """`PackedModule.product` with a gradient for x, for which the matrix is decoded a second time.

    Its backward pass is a product with the decoded matrix by `ops.linear`, which can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedModule, name: str, expert: int | None) -> Tensor:
        ctx.source = (module, name, expert)
        return ops.linear(x, module.decode(name, x.dtype, expert), backend=module.backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        module, name, expert = ctx.source
        return ops.linear(grad, module.decode(name, grad.dtype, expert).T, backend=module.backend), None, None, None


class PackedLinear(PackedModule, nn.Linear):
    """`Linear` with a packed weight; a bias stays plain. A subclass of `nn.Linear`, so that adapters recognise it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight unpacked
        self._start(compute_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.add("weight", format, out_features, in_features)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        if self.kernels(x, "weight", others=(self.bias,)):
            rows, columns = self.shapes["weight"]
            return cpu.packed_linear(
                x, self.get_stored("weight"), self.formats["weight"].name, rows, columns, self.bias
            )
        wide = x.to(self.compute_dtype or x.dtype)
        y = self.product(wide, "weight")
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class PackedEmbedding(PackedModule, nn.Embedding):
    """`nn.Embedding` with packed weights, which decodes the rows requested. It returns `compute_dtype`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: Format,
        compute_dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
    ) -> None:
        nn.Module.__init__(self)  # as in `PackedLinear`
        self._start(compute_dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.add("weight", format, num_embeddings, embedding_dim)

    @no_grad
    def forward(self, input: Tensor) -> Tensor:
        """input (...) of ids -> (..., D) in `compute_dtype`, fp32 by default."""
        parts, (rows, columns) = self.parts("weight"), self.shapes["weight"]
        if mapped(input):  # under vmap, the requested rows cannot be known
            return F.embedding(input, self.decode("weight", torch.float32)).to(self.compute_dtype or torch.float32)
        if self.kernels(input, "weight"):
            values = cpu.packed_embedding(input, parts[CODES], self.formats["weight"].name, rows, columns)
            return values.to(self.compute_dtype or torch.float32)
        chosen = self.formats["weight"].decode_rows(parts, input.reshape(-1), rows, columns)
        return chosen.to(self.compute_dtype or torch.float32).view(*input.shape, columns)


class PackedExperts(PackedModule):
    """`Experts` with packed weights: decodes the experts that tokens chose, one at a time, and no others.

    `format` is one for both matrices, or one by name ("gate_up_proj", "down_proj"), where None leaves a matrix plain:
    a parameter in the default dtype, like those of `Experts`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor],
        format: Format | Mapping[str, Format | None],
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(compute_dtype)
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        self.act_fn = activation
        shapes = {
            "gate_up_proj": (2 * intermediate_size, hidden_size),
            "down_proj": (hidden_size, intermediate_size),
        }
        for name, shape in shapes.items():
            chosen = format if isinstance(format, Format) else format[name]
            if chosen is None:
                self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
            else:
                self.add(name, chosen, *shape)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """See `Experts.activation`."""
        return plain_activation(self.act_fn)

    @activation.setter
    def activation(self, value: Callable[[Tensor], Tensor]) -> None:
        self.act_fn = value

    @property
    def stack(self) -> tuple[int, ...]:
        """See `PackedModule.stack`."""
        return (self.num_experts,)

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D) in x's dtype."""
        reason = None if self.activation is F.silu else "its experts compute SwiGLU with silu only"
        if self.kernels(x_ND, "gate_up_proj", "down_proj", others=(weights_NK,), unsupported_reason=reason):
            packed = [(self.parts(n)[CODES], self.formats[n].name) for n in ("gate_up_proj", "down_proj")]
            return cpu.packed_moe(x_ND, weights_NK, expert_ids_NK, packed[0], packed[1], self.shapes["down_proj"][1])
        if mapped(expert_ids_NK):  # the chosen experts cannot be known
            wide_ND = x_ND.to(self.compute_dtype or x_ND.dtype)
            gate_up, down = (self.whole(name, wide_ND.dtype) for name in ("gate_up_proj", "down_proj"))
            inputs = wide_ND, weights_NK, expert_ids_NK, gate_up, down
            return ops.moe(*inputs, self.activation, backend=self.backend).to(x_ND.dtype)
        return self.routed(x_ND, expert_ids_NK, weights_NK, self.product)

    def routed(
        self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, product: Callable[[Tensor, str, int], Tensor]
    ) -> Tensor:
        """`forward` in terms of `product(x, name, expert)`, this module's own or one that adds to it."""
        return routed(self, x_ND, expert_ids_NK, weights_NK, product, self.compute_dtype or x_ND.dtype)

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stack of matrices, decoded if it is packed."""
        if name not in self.formats:
            plain: Tensor = getattr(self, name)
            return plain.to(dtype)
        return torch.stack([self.decode(name, dtype, e) for e in range(self.num_experts)])


def routed(
    experts: Experts | PackedExperts,
    x_ND: Tensor,
    expert_ids_NK: Tensor,
    weights_NK: Tensor,
    product: Callable[[Tensor, str, int], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The output of `experts`, with `product(x, name, expert)` for their matrices, in `dtype`, one expert at a time."""
    rows = ops.sort_by_expert(expert_ids_NK, experts.num_experts, backend=experts.backend)
    x_MD = ops.gather_rows(x_ND.to(dtype), rows, backend=experts.backend)
    offsets, parts = rows.offsets_E.tolist(), []
    for e, (start, end) in enumerate(pairwise(offsets)):
        if start < end:
            gate, up = product(x_MD[start:end], "gate_up_proj", e).chunk(2, dim=-1)
            parts.append(product(experts.activation(gate) * up, "down_proj", e))
    out_MD = torch.cat(parts) if parts else x_MD
    return ops.combine(out_MD, weights_NK, rows, backend=experts.backend).to(x_ND.dtype)
