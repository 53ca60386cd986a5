"""Operations of fp32 training in the C++ kernels, forward and backward: what `torch_fast` does there, but faster.

With `products=torch.bfloat16` the same operations multiply numbers rounded to bf16, on CPUs with an instruction for it
(`lowered`); sums and everything else stay in fp32.

Their products use a CPU's full vector width, which torch's library does not on every CPU, and run on torch's own
threads. Only the inputs of an operation are kept for the backward pass, and for experts the products with their first
weight: rows are gathered again and the gated unit is computed again, so that what is kept does not grow with the number
of experts per token, as long as their total width is the same.

The functions here are for tensors that `takes` accepts. A backward pass that is itself differentiated uses `plain`, the
same function in torch's operations.

Shapes legend: N tokens, D hidden, H heads, Dh head dim, E experts, K experts per token, M = N*K routed rows, F expert
width, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmoe.ops.cpu.extension import isa, kernels, unsupported
from olmoe.ops.transforms import followed, plain_gradients

Plain = Callable[..., Tensor]
# Numbers of a head that the kernels of attention take: `kCausalDim` of csrc/core/types.h.
LARGEST_HEAD = 256

_INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# The kernels number tokens and routed rows in 32 bits.
_MOST_ROWS = 2**31 - 1


def takes(*tensors: Tensor | None, indices: Tensor | None = None) -> bool:
    """Whether the functions here take these numbers, one of them with a gradient, and `indices` (ids or labels)."""
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return needed and _reads(tensors, indices)


def takes_products(products: torch.dtype, *tensors: Tensor | None, indices: Tensor | None = None) -> bool:
    """Whether the functions of this module can compute with these tensors and `products`.

    Without gradients too, so that a loss is the same in training and in evaluation.
    """
    return products is torch.bfloat16 and _reads(tensors, indices) and bool(kernels().has_bf16_products())


def _reads(tensors: tuple[Tensor | None, ...], indices: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    if any(t.dtype != torch.float32 or t.numel() == 0 for t in given):
        return False
    if indices is not None and (indices.dtype not in _INDEX_TYPES or indices.numel() > _MOST_ROWS):
        return False
    # The scalar kernels use no vectors, while torch's do.
    return unsupported(*given, indices, gradients=True) is None and isa() != "scalar"


@functools.cache
def _share_threads() -> None:
    """Tell the kernels how to run on torch's threads, where its OpenMP library is GNU's or speaks its language."""
    try:
        parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, TypeError, AttributeError):
        parallel = None
    kernels().set_parallel(parallel or 0)


def _kernels() -> Any:
    module = kernels()
    _share_threads()
    return module


def _numbers(products: torch.dtype | None) -> Any:
    """What the kernels are told to multiply."""
    return kernels().Products.FP32 if products is None else kernels().Products.BF16


def _room(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dense(t: Tensor) -> Tensor:
    return t.detach().contiguous()


def _if(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None


def _followed_gradients(ctx: Any, inputs: tuple[Tensor | None, ...], gradient: Tensor) -> list[Tensor | None]:
    """The gradients of `ctx.plain` for its first inputs, which can be differentiated and mapped themselves."""
    given = [t for t in inputs if t is not None]
    needs = [need for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if t is not None]

    def plain(*tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        out: Tensor = ctx.plain(*(None if t is None else next(remaining) for t in inputs))
        return out

    found = iter(plain_gradients(plain, given, needs, gradient))
    return [None if t is None else next(found) for t in inputs]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plain: Plain, products: torch.dtype | None = None) -> Tensor:
    """See `ops.linear`."""
    if weight.shape[1:] != x.shape[-1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return plain(x, weight, bias)  # which says what does not fit
    out: Tensor = _Linear.apply(x, weight, bias, plain, products)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plain: Plain, products: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.plain, ctx.products = plain, products
        inputs, w, b = _dense(x), _dense(weight), None if bias is None else _dense(bias)
        out = _room(*x.shape[:-1], weight.shape[0])
        rows, columns = weight.shape
        _kernels().linear_forward(
            _numbers(products),
            inputs.data_ptr(),
            w.data_ptr(),
            _address(b),
            x.numel() // columns,
            rows,
            columns,
            out.data_ptr(),
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if followed(grad):
            return (*_followed_gradients(ctx, (x, weight, bias), grad), None, None)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        inputs, w, gradient = _dense(x), _dense(weight), _dense(grad)
        grad_x, grad_weight = _if(need_x, x), _if(need_weight, weight)
        rows, columns = weight.shape
        _kernels().linear_backward(
            _numbers(ctx.products),
            inputs.data_ptr(),
            w.data_ptr(),
            gradient.data_ptr(),
            x.numel() // columns,
            rows,
            columns,
            _address(grad_x),
            _address(grad_weight),
        )
        return grad_x, grad_weight, gradient.view(-1, rows).sum(dim=0) if need_bias else None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plain: Plain) -> Tensor:
    """See `ops.rms_norm`."""
    if weight.shape != x.shape[-1:]:
        return plain(x, weight)  # which says what does not fit
    out: Tensor = _RMSNorm.apply(x, weight, eps, plain)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plain: Plain) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.plain = eps, plain
        inputs, w, out = _dense(x), _dense(weight), _room(*x.shape)
        d = x.shape[-1]
        _kernels().norm_forward(inputs.data_ptr(), w.data_ptr(), eps, x.numel() // d, d, out.data_ptr())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if followed(grad):
            return (*_followed_gradients(ctx, (x, weight), grad), None, None)
        inputs, w, gradient = _dense(x), _dense(weight), _dense(grad)
        grad_x, grad_weight = (_if(need, t) for need, t in zip(ctx.needs_input_grad, (x, weight), strict=False))
        d = x.shape[-1]
        _kernels().norm_backward(
            inputs.data_ptr(),
            w.data_ptr(),
            gradient.data_ptr(),
            ctx.eps,
            x.numel() // d,
            d,
            _address(grad_x),
            _address(grad_weight),
        )
        return grad_x, grad_weight, None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, plain: Plain) -> Tensor:
    """See `ops.apply_rope`; cos and sin have no gradients."""
    angles = (*x.shape[:-2], x.shape[-1] // 2)
    if x.shape[-1] % 2 or any(not _expands(t, angles) for t in (cos, sin)):
        return plain(x, cos, sin)  # which broadcasts x as well, or says what does not fit
    out: Tensor = _Rope.apply(x, cos, sin, plain)
    return out


def _expands(t: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `t.expand(shape)` is possible."""
    return t.dim() <= len(shape) and all(a in (1, b) for a, b in zip(t.shape[::-1], shape[::-1], strict=False))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    heads, head_dim = x.shape[-2:]
    shape = (*x.shape[:-2], head_dim // 2)
    inputs, cosines, sines = _dense(x), _dense(cos.expand(shape)), _dense(sin.expand(shape))
    out = _room(*x.shape)
    tokens = x.numel() // (heads * head_dim)
    _kernels().rotate(
        inputs.data_ptr(), cosines.data_ptr(), sines.data_ptr(), tokens, heads, head_dim, back, out.data_ptr()
    )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, plain: Plain) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.plain = plain
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if followed(grad):  # the gradient of a rotation is the opposite rotation
            return ctx.plain(grad, cos, -sin), None, None, None
        return _rotated(grad, cos, sin, back=True), None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, plain: Plain, products: torch.dtype | None = None) -> Tensor:
    """See `ops.attention`, causal and without a mask, for tensors that `fits_attention`."""
    out: Tensor = _Attention.apply(q, k, v, plain, products)
    return out


def fits_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` computes with these shapes: queries of every token that there are keys of."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        return False
    batch, heads, tokens, head_dim = q.shape
    return k.shape == (batch, k.shape[1], tokens, head_dim) and heads % k.shape[1] == 0 and head_dim <= LARGEST_HEAD


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
    return _room(batch, tokens, heads, head_dim).transpose(1, 2)


@torch.library.custom_op("olmoe::causal_attention", mutates_args=())
def _causal_attention(q: Tensor, k: Tensor, v: Tensor, lowered: bool) -> tuple[Tensor, Tensor]:
    """The output, and what backward needs of sums of exponentials (B, H, T).

    As an operator of torch, so that selective checkpointing can keep what it returns.
    """
    q, k, v = (_with_rows(t) for t in (q, k, v))
    out, sums = _room_for_heads(q), _room(*q.shape[:3])
    _kernels().causal_forward(
        _numbers(torch.bfloat16 if lowered else None),
        _attention_shape(q, k),
        *(_heads(t) for t in (q, k, v, out)),
        sums.data_ptr(),
    )
    return out, sums


def _attention_shape(q: Tensor, k: Tensor) -> Any:
    batch, heads, tokens, head_dim = q.shape
    return kernels().AttentionShape(batch, heads, k.shape[1], tokens, head_dim)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plain: Plain, products: torch.dtype | None) -> Tensor:
        out, sums = _causal_attention(q, k, v, products is not None)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.plain, ctx.products = plain, products
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        if followed(grad):
            return (*_followed_gradients(ctx, (q, k, v), grad), None, None)
        inputs = [_with_rows(t) for t in (q, k, v)]
        gradients = [_room_for_heads(t) for t in (q, k, v)]
        gradient, shape = _with_rows(grad), _attention_shape(q, k)
        _kernels().causal_backward(
            _numbers(ctx.products),
            shape,
            *(_heads(t) for t in (*inputs, out.detach())),
            sums.data_ptr(),
            *(_heads(t) for t in (gradient, *gradients)),
        )
        return (*(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)), None, None)


class _Rows:
    """The routed rows of `ids` (N, K), sorted by expert.

    With `first`, the experts have the ids from that on, and choices of others have no rows.
    """

    def __init__(self, ids_NK: Tensor, num_experts: int, first: int | None = None) -> None:
        n, k = ids_NK.shape
        ids = _dense(ids_NK).long()
        # Offsets, order, token ids and positions, end to end; the kernels are given their addresses.
        self._memory = torch.empty(num_experts + 1 + 3 * n * k, dtype=torch.int32, device="cpu")
        parts = self._memory.split([num_experts + 1, n * k, n * k, n * k])
        self.kernel = _kernels().RoutedRows(n, k, num_experts, *(part.data_ptr() for part in parts))
        self.count = self.kernel.sort(ids.data_ptr(), first or 0)
        if first is None and self.count < n * k:
            raise IndexError(f"expert ids from {int(ids.min())} to {int(ids.max())} are not all below {num_experts}")


def _expert_weights(gate_up: Tensor, down: Tensor) -> Any:
    _, hidden, width = down.shape
    return _kernels().ExpertWeights(gate_up.data_ptr(), down.data_ptr(), hidden, width)


def moe(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    plain: Plain,
    products: torch.dtype | None = None,
    first: int | None = None,
) -> Tensor:
    """See `ops.moe`, or with `first` `ops.moe_part`, with silu."""
    out: Tensor = _MoE.apply(x, weights_NK, expert_ids_NK, gate_up, down, plain, products, first)
    return out


def experts(rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, plain: Plain) -> Tensor:
    """See `ops.experts`, with silu: `moe` where each row has one expert, of weight 1."""

    def plain_rows(rows_MD: Tensor, _weights: Tensor, _ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return plain(rows_MD, offsets_E, gate_up, down)

    m = len(rows_MD)
    ids_M = torch.repeat_interleave(torch.arange(len(gate_up)), offsets_E.diff(), output_size=m)
    return moe(rows_MD, rows_MD.new_ones(m, 1), ids_M.unsqueeze(1), gate_up, down, plain_rows)


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights_NK: Tensor,
        expert_ids_NK: Tensor,
        gate_up: Tensor,
        down: Tensor,
        plain: Plain,
        products: torch.dtype | None,
        first: int | None,
    ) -> Tensor:
        count, d, f = down.shape
        assert gate_up.shape == (count, 2 * f, d)
        assert x.shape == (len(expert_ids_NK), d)
        assert weights_NK.shape == expert_ids_NK.shape
        rows = _Rows(expert_ids_NK, count, first)
        inputs, weights, wide, back = _dense(x), _dense(weights_NK), _dense(gate_up), _dense(down)
        units_M2F, results_MD, out = _room(rows.count, 2 * f), _room(rows.count, d), _room(*x.shape)
        _kernels().experts_forward(
            _numbers(products),
            inputs.data_ptr(),
            weights.data_ptr(),
            rows.kernel,
            _expert_weights(wide, back),
            units_M2F.data_ptr(),
            results_MD.data_ptr(),
            out.data_ptr(),
        )
        ctx.plain, ctx.products, ctx.first = plain, products, first
        ctx.save_for_backward(x, weights_NK, expert_ids_NK, gate_up, down, units_M2F)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights_NK, expert_ids_NK, gate_up, down, units_M2F = ctx.saved_tensors
        need_x, need_weights, _, need_gate_up, need_down, *_ = ctx.needs_input_grad
        if followed(grad):
            return (*_followed_gradients(ctx, (x, weights_NK, expert_ids_NK, gate_up, down), grad), None, None, None)
        rows = _Rows(expert_ids_NK, down.shape[0], ctx.first)
        inputs, weights, wide, back = _dense(x), _dense(weights_NK), _dense(gate_up), _dense(down)
        gradient, hidden_MF = _dense(grad), _room(rows.count, down.shape[2])
        grad_units_M2F, grad_rows_MD = torch.empty_like(units_M2F), _room(rows.count, x.shape[1]) if need_x else None
        grad_x, grad_weights = _if(need_x, x), _if(need_weights, weights_NK)
        grad_gate_up, grad_down = _if(need_gate_up, gate_up), _if(need_down, down)
        _kernels().experts_backward(
            _numbers(ctx.products),
            inputs.data_ptr(),
            weights.data_ptr(),
            rows.kernel,
            _expert_weights(wide, back),
            units_M2F.data_ptr(),
            gradient.data_ptr(),
            _address(grad_x),
            _address(grad_weights),
            _address(grad_gate_up),
            _address(grad_down),
            hidden_MF.data_ptr(),
            grad_units_M2F.data_ptr(),
            _address(grad_rows_MD),
        )
        return grad_x, grad_weights, None, grad_gate_up, grad_down, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    plain: Plain,
    products: torch.dtype | None = None,
) -> Tensor:
    """See `ops.linear_cross_entropy`. Both gradients are computed with the loss, while the logits exist."""
    out: Tensor = _LinearCrossEntropy.apply(x, weight, labels, ignore_index, plain, products)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        plain: Plain,
        products: torch.dtype | None,
    ) -> Tensor:
        inputs, w, targets = _dense(x), _dense(weight), _dense(labels).long()
        words, d = weight.shape
        assert x.shape == (len(labels), d)
        assert labels.dim() == 1
        used = targets[targets != ignore_index]
        if len(used):
            low, high = (int(t) for t in torch.aminmax(used))
            if low < 0 or high >= words:
                raise IndexError(f"labels from {low} to {high} are not all below {words}")
        grad_x, grad_weight = _if(ctx.needs_input_grad[0], x), _if(ctx.needs_input_grad[1], weight)
        module = _kernels()
        logits = _room(min(len(labels), module.loss_tokens), words)
        loss = module.cross_entropy(
            _numbers(products),
            inputs.data_ptr(),
            w.data_ptr(),
            targets.data_ptr(),
            ignore_index,
            len(labels),
            d,
            words,
            logits.data_ptr(),
            _address(grad_x),
            _address(grad_weight),
        )
        ctx.plain = plain
        ctx.save_for_backward(x, weight, labels, grad_x, grad_weight)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, *gradients = ctx.saved_tensors
        if followed(grad):
            return (*_followed_gradients(ctx, (x, weight, labels), grad)[:2], None, None, None, None)
        return (*(None if g is None else g * grad for g in gradients), None, None, None, None)
