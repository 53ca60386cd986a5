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


def shared_kernels() -> Any:
    """The kernels, which run on torch's threads."""
    module = kernels()
    _share_threads()
    return module


def numbers_of(products: torch.dtype | None) -> Any:
    """The kernels' name for the dtype of products."""
    return kernels().Products.FP32 if products is None else kernels().Products.BF16


def room(*shape: int) -> Tensor:
    """Memory of that shape for the kernels to write."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def dense(t: Tensor) -> Tensor:
    """`t` without its history, and contiguous."""
    return t.detach().contiguous()


def _if(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None


def followed_gradients(ctx: Any, inputs: tuple[Tensor | None, ...], gradient: Tensor) -> list[Tensor | None]:
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
        inputs, w, b = dense(x), dense(weight), None if bias is None else dense(bias)
        out = room(*x.shape[:-1], weight.shape[0])
        rows, columns = weight.shape
        shared_kernels().linear_forward(
            numbers_of(products),
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
            return (*followed_gradients(ctx, (x, weight, bias), grad), None, None)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        inputs, w, gradient = dense(x), dense(weight), dense(grad)
        grad_x, grad_weight = _if(need_x, x), _if(need_weight, weight)
        rows, columns = weight.shape
        shared_kernels().linear_backward(
            numbers_of(ctx.products),
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
        inputs, w, out = dense(x), dense(weight), room(*x.shape)
        d = x.shape[-1]
        shared_kernels().norm_forward(inputs.data_ptr(), w.data_ptr(), eps, x.numel() // d, d, out.data_ptr())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if followed(grad):
            return (*followed_gradients(ctx, (x, weight), grad), None, None)
        inputs, w, gradient = dense(x), dense(weight), dense(grad)
        grad_x, grad_weight = (_if(need, t) for need, t in zip(ctx.needs_input_grad, (x, weight), strict=False))
        d = x.shape[-1]
        shared_kernels().norm_backward(
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
    inputs, cosines, sines = dense(x), dense(cos.expand(shape)), dense(sin.expand(shape))
    out = room(*x.shape)
    tokens = x.numel() // (heads * head_dim)
    shared_kernels().rotate(
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


def route(logits_NE: Tensor, k: int, plain: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """See `ops.route`, without `norm_topk_prob`. `plain` gives weights and expert ids."""
    if logits_NE.dim() != 2 or not 0 < k <= logits_NE.shape[1]:
        return plain(logits_NE)  # which says what does not fit
    weights_NK, expert_ids_NK = _Route.apply(logits_NE, k, lambda logits: plain(logits)[0])
    return weights_NK, expert_ids_NK


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, k: int, plain: Plain) -> tuple[Tensor, Tensor]:
        n, experts = logits_NE.shape
        logits, probabilities_NE, weights_NK = dense(logits_NE), room(n, experts), room(n, k)
        expert_ids_NK = torch.empty(n, k, dtype=torch.long, device="cpu")
        shared_kernels().route_forward(
            logits.data_ptr(),
            n,
            experts,
            k,
            *(t.data_ptr() for t in (probabilities_NE, weights_NK, expert_ids_NK)),
        )
        ctx.mark_non_differentiable(expert_ids_NK)
        ctx.save_for_backward(logits_NE, probabilities_NE, expert_ids_NK)
        ctx.plain = plain
        return weights_NK, expert_ids_NK

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _ids: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NE, probabilities_NE, expert_ids_NK = ctx.saved_tensors
        if followed(grad):
            return (*followed_gradients(ctx, (logits_NE,), grad), None, None)
        gradient, grad_logits = dense(grad), torch.empty_like(probabilities_NE)
        n, experts = probabilities_NE.shape
        shared_kernels().route_backward(
            *(t.data_ptr() for t in (probabilities_NE, expert_ids_NK, gradient)),
            n,
            experts,
            expert_ids_NK.shape[1],
            grad_logits.data_ptr(),
        )
        return grad_logits, None, None


class _Rows:
    """The routed rows of `ids` (N, K), sorted by expert.

    With `first`, the experts have the ids from that on, and choices of others have no rows.
    """

    def __init__(self, ids_NK: Tensor, num_experts: int, first: int | None = None) -> None:
        n, k = ids_NK.shape
        ids = dense(ids_NK).long()
        # Offsets, order, token ids and positions, end to end; the kernels are given their addresses.
        self._memory = torch.empty(num_experts + 1 + 3 * n * k, dtype=torch.int32, device="cpu")
        parts = self._memory.split([num_experts + 1, n * k, n * k, n * k])
        self.kernel = shared_kernels().RoutedRows(n, k, num_experts, *(part.data_ptr() for part in parts))
        self.count = self.kernel.sort(ids.data_ptr(), first or 0)
        if first is None and self.count < n * k:
            raise IndexError(f"expert ids from {int(ids.min())} to {int(ids.max())} are not all below {num_experts}")


def _expert_weights(gate_up: Tensor, down: Tensor) -> Any:
    _, hidden, width = down.shape
    return shared_kernels().ExpertWeights(gate_up.data_ptr(), down.data_ptr(), hidden, width)


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
        inputs, weights, wide, back = dense(x), dense(weights_NK), dense(gate_up), dense(down)
        units_M2F, results_MD, out = room(rows.count, 2 * f), room(rows.count, d), room(*x.shape)
        shared_kernels().experts_forward(
            numbers_of(products),
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
            return (*followed_gradients(ctx, (x, weights_NK, expert_ids_NK, gate_up, down), grad), None, None, None)
        rows = _Rows(expert_ids_NK, down.shape[0], ctx.first)
        inputs, weights, wide, back = dense(x), dense(weights_NK), dense(gate_up), dense(down)
        gradient, hidden_MF = dense(grad), room(rows.count, down.shape[2])
        grad_units_M2F, grad_rows_MD = torch.empty_like(units_M2F), room(rows.count, x.shape[1]) if need_x else None
        grad_x, grad_weights = _if(need_x, x), _if(need_weights, weights_NK)
        grad_gate_up, grad_down = _if(need_gate_up, gate_up), _if(need_down, down)
        shared_kernels().experts_backward(
            numbers_of(ctx.products),
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
        inputs, w, targets = dense(x), dense(weight), dense(labels).long()
        words, d = weight.shape
        assert x.shape == (len(labels), d)
        assert labels.dim() == 1
        used = targets[targets != ignore_index]
        if len(used):
            low, high = (int(t) for t in torch.aminmax(used))
            if low < 0 or high >= words:
                raise IndexError(f"labels from {low} to {high} are not all below {words}")
        grad_x, grad_weight = _if(ctx.needs_input_grad[0], x), _if(ctx.needs_input_grad[1], weight)
        module = shared_kernels()
        logits = room(min(len(labels), module.loss_tokens), words)
        loss = module.cross_entropy(
            numbers_of(products),
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
            return (*followed_gradients(ctx, (x, weight, labels), grad)[:2], None, None, None, None)
        return (*(None if g is None else g * grad for g in gradients), None, None, None, None)
