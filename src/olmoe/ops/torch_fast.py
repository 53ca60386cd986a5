"""Vectorised torch: the backend that runs everywhere torch runs, forward and backward.

The MoE path sorts routed rows by expert, multiplies them in groups and gathers them back; its
backward passes gather too, so nothing scatters with atomics and results do not depend on threads.

On a CPU without bf16 matrix instructions torch multiplies bf16 at a tenth of its fp32 speed; here
weights are then converted to fp32 in parts that stay in cache, and multiplied in fp32.

Under torch.compile each operation is written so that it traces: plain tensor code, which the compiler fuses and
differentiates, in place of autograd functions that work part by part, and one opaque operator for the grouped product.
Under the transforms of torch.func, and forward-mode differentiation, it is plain tensor code as well (`composable`),
and so are the backward passes of autograd functions where they are to be differentiated themselves.

Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, E experts, K experts per token,
M = N*K routed rows, F expert width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from olmoe.ops import composable, widened
from olmoe.ops.autocast import autocast_dtype, without_autocast
from olmoe.ops.cpu import causal as causal_kernels
from olmoe.ops.cpu import training
from olmoe.ops.dispatch import AUTO, call, register
from olmoe.ops.gated_unit import gated_unit
from olmoe.ops.reference import Activation
from olmoe.ops.reference import linear_cross_entropy as plain_cross_entropy
from olmoe.ops.transforms import followed, mapped, plain_attention, plain_gradients, transformed, twice_differentiable
from olmoe.ops.types import SortedRows
from olmoe.ops.widened import matmul_transposed
from olmoe.runtime import cpu_multiplies_bf16

# Tokens whose logits exist at a time in linear_cross_entropy: 512 x 4096 fp32 are 8 MB.
CROSS_ENTROPY_TOKENS = 512
# Tokens whose rows are combined at a time in half precision: 64 x 8 x 2048 fp32 are 4 MB.
COMBINE_TOKENS = 64
# Below this many rows torch's bf16 matrix-vector product, which reads each weight once as bf16, beats
# converting the weight.
CONVERT_MIN_ROWS = 5
# Narrower norms are not worth a call of our own.
NORM_MIN_WIDTH = 16


def _widen(x: Tensor, rows: int, dtype: torch.dtype | None = None) -> bool:
    """Whether to multiply `rows` rows of `x`, in its dtype or another, in fp32, as the CPU's own product is slow."""
    dtype = dtype or x.dtype
    if x.device.type != "cpu" or dtype == torch.float32 or is_compiling():
        return False
    if dtype == torch.bfloat16 and cpu_multiplies_bf16():
        return False
    return rows >= CONVERT_MIN_ROWS


@register("linear", "torch", autocasts=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    if widened.is_mixed(x, weight):
        return widened.linear(x, weight, bias)
    rows, lower = x.numel() // max(x.shape[-1], 1), autocast_dtype(x)
    if lower is None and training.takes(x, weight, bias):
        return training.linear(x, weight, bias, F.linear)
    if not _widen(x, rows, lower):
        return F.linear(x, weight, bias)  # which autocast lowers
    if lower is not None or transformed(x) or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        with without_autocast(x):
            wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(lower or x.dtype)
    y = matmul_transposed(x.reshape(rows, x.shape[-1]).float(), weight)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


@register("rms_norm", "torch")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`. torch's fused kernel is used where its rounding is the same (fp32)."""
    if x.dtype == torch.float32 and weight.dtype == torch.float32:

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)

        if x.shape[-1] >= NORM_MIN_WIDTH and training.takes(x, weight):
            return training.rms_norm(x, weight, eps, plain)
        return plain(x, weight)
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


@register("apply_rope", "torch")
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.apply_rope`."""
    if training.takes(x, cos, sin) and not (cos.requires_grad or sin.requires_grad):
        return training.apply_rope(x, cos, sin, _apply_rope)
    return _apply_rope(x, cos, sin)


def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    # fp32 cos and sin promote the products to fp32 whatever the dtype of x.
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)


@register("attention", "torch", autocasts=True)
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """See `reference.attention`."""
    grouped, lower = q.shape[1] != k.shape[1], autocast_dtype(q)
    if lower is not None:  # here rather than by torch, whose own copies would be kept beside the inputs
        q, k, v = (t.to(lower) for t in (q, k, v))
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        # torch's is_causal aligns the first query with the first key; ours aligns the last ones.
        t, s = q.shape[2], k.shape[2]
        allowed = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        mask, causal = allowed if mask is None else mask & allowed, False

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with plain_attention():
            return fused(q, k, v)

    if causal and lower is None and training.takes(q, k, v) and causal_kernels.fits(q, k, v):
        return causal_kernels.attention(q, k, v, plain)
    with without_autocast(q):
        out = twice_differentiable(fused, plain, q, k, v)
    if mask is not None:
        # Rows that may attend to nothing are zeros here as in the reference, on every torch kernel.
        out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return out


@register("route", "torch")
def route(logits: Tensor, k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""

    def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
        return _route(logits, k, norm_topk_prob)

    return training.route(logits, k, plain) if training.takes(logits) and not norm_topk_prob else plain(logits)


def _route(logits: Tensor, k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights_NK, expert_ids_NK = torch.topk(probabilities, k, dim=-1)
    if norm_topk_prob:
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
    return weights_NK, expert_ids_NK


@register("sort_by_expert", "torch")
def sort_by_expert(expert_ids_NK: Tensor, num_experts: int) -> SortedRows:
    """See `reference.sort_by_expert`."""
    if mapped(expert_ids_NK):
        return composable.sort_by_expert(expert_ids_NK, num_experts)
    n, k = expert_ids_NK.shape
    flat = expert_ids_NK.reshape(-1)
    # A 16-bit key sorts twice as fast, and no OLMoE has 32768 experts.
    sorted_M, order_M = torch.sort(flat.to(torch.int16) if num_experts < 2**15 else flat, stable=True)
    position_M = torch.empty_like(order_M)
    position_M[order_M] = torch.arange(n * k, device=flat.device)
    boundaries_E = torch.arange(num_experts + 1, device=flat.device, dtype=sorted_M.dtype)
    offsets_E = torch.searchsorted(sorted_M, boundaries_E)
    return SortedRows(order_M, order_M // k, position_M.view(n, k), offsets_E)


class _GatherRows(torch.autograd.Function):
    """Rows by token id; the gradient of a token is the sum over its K rows, gathered in the order of k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_ids_M: Tensor, position_NK: Tensor) -> Tensor:
        ctx.save_for_backward(position_NK)
        return x.index_select(0, token_ids_M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (position_NK,) = ctx.saved_tensors
        if followed(grad):
            return composable.sum_rows(grad, position_NK), None, None
        summed = F.embedding_bag(position_NK, grad.float().contiguous(), mode="sum")
        return summed.to(grad.dtype), None, None


@register("gather_rows", "torch")
def gather_rows(x: Tensor, rows: SortedRows) -> Tensor:
    """See `reference.gather_rows`."""
    if is_compiling() or transformed() or not (torch.is_grad_enabled() and x.requires_grad):
        return x.index_select(0, rows.token_ids_M)
    return _GatherRows.apply(x, rows.token_ids_M, rows.position_NK)


class _Combine(torch.autograd.Function):
    """Weighted gather-sum of rows back to tokens; both gradients are gathers of the token's gradient."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weights_NK: Tensor, position_NK: Tensor, order_M: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MD, weights_NK, position_NK, order_M)
        wide = F.embedding_bag(position_NK, rows_MD.float(), per_sample_weights=weights_NK.float(), mode="sum")
        return wide.to(rows_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_MD, weights_NK, position_NK, order_M = ctx.saved_tensors
        if followed(grad_ND):
            gradients = composable.combine_gradients(grad_ND, rows_MD, weights_NK, position_NK, order_M)
            return (*gradients, None, None)
        grad_MD = grad_ND.float().index_select(0, order_M // weights_NK.shape[1])
        with without_autocast(grad_MD):
            grad_weights_M = torch.linalg.vecdot(grad_MD, rows_MD.float())
        grad_weights_NK = grad_weights_M[position_NK].to(weights_NK.dtype)
        weights_M = weights_NK.float().flatten()[order_M]
        return (grad_MD.mul_(weights_M.unsqueeze(1))).to(rows_MD.dtype), grad_weights_NK, None, None


@register("combine", "torch")
def combine(rows_MD: Tensor, weights_NK: Tensor, rows: SortedRows) -> Tensor:
    """See `reference.combine`."""
    if is_compiling() or transformed():
        return (rows_MD[rows.position_NK].float() * weights_NK.float().unsqueeze(-1)).sum(dim=1).to(rows_MD.dtype)
    if rows_MD.dtype != torch.float32 and not (torch.is_grad_enabled() and rows_MD.requires_grad):
        # In parts: an fp32 copy of all rows would leave the cache.
        out = torch.empty(rows.position_NK.shape[0], rows_MD.shape[1], dtype=rows_MD.dtype, device=rows_MD.device)
        for start in range(0, out.shape[0], COMBINE_TOKENS):
            part = slice(start, start + COMBINE_TOKENS)
            wide_NKD = rows_MD[rows.position_NK[part]].float()
            out[part] = torch.bmm(weights_NK[part].float().unsqueeze(1), wide_NKD).squeeze(1)
        return out
    return _Combine.apply(rows_MD, weights_NK, rows.position_NK, rows.order_M)


def _aligned(*tensors: Tensor) -> bool:
    """torch's grouped product needs rows of a multiple of 16 bytes."""
    return all(t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)


class _Dense(torch.autograd.Function):
    """Passes a tensor on and makes gradients of every order dense: those of a sum are one number, of stride 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _dense(grad.contiguous() if transformed(grad) or 0 in grad.stride() else grad)


def _dense(x: Tensor) -> Tensor:
    """`x`, with gradients that torch's grouped product takes."""
    if transformed(x) or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    dense: Tensor = _Dense.apply(x)
    return dense


def _grouped_linear(rows_MI: Tensor, weight: Tensor, offsets_E: Tensor) -> Tensor:
    """Each expert's rows times its own weight^T. rows (M, I) sorted, weight (E, O, I), offsets (E+1,) -> (M, O)."""
    if _aligned(rows_MI, weight) and weight.shape[1] * weight.element_size() % 16 == 0 and rows_MI.shape[0]:
        rows_MI, weight = _dense(rows_MI), _dense(weight)
        return _dense(F.grouped_mm(rows_MI, weight.transpose(1, 2), offs=offsets_E[1:].to(torch.int32)))
    counts = offsets_E.diff().tolist()
    parts = rows_MI.split(counts)
    return torch.cat([part @ weight[e].T for e, part in enumerate(parts)])


@torch.library.custom_op("olmoe::grouped_linear", mutates_args=())
def _grouped_linear_op(rows_MI: Tensor, weight: Tensor, offsets_E: Tensor) -> Tensor:
    """`_grouped_linear` as one node of a compiled graph, which could not read the offsets."""
    if not _widen(rows_MI, CONVERT_MIN_ROWS):
        return _grouped_linear(rows_MI.contiguous(), weight, offsets_E)
    parts = rows_MI.float().split(offsets_E.diff().tolist())
    out = [matmul_transposed(part, weight[e]) for e, part in enumerate(parts) if part.shape[0]]
    return torch.cat(out).to(rows_MI.dtype) if out else rows_MI.new_empty(0, weight.shape[1])


@_grouped_linear_op.register_fake
def _(rows_MI: Tensor, weight: Tensor, offsets_E: Tensor) -> Tensor:
    return rows_MI.new_empty(rows_MI.shape[0], weight.shape[1])


@torch.library.custom_op("olmoe::grouped_weight_gradient", mutates_args=())
def _grouped_weight_gradient(grad_MO: Tensor, rows_MI: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of each expert's weight: grad^T rows over its own rows. (M, O), (M, I), (E+1,) -> (E, O, I)."""
    counts = offsets_E.diff().tolist()
    pairs = zip(grad_MO.split(counts), rows_MI.split(counts), strict=True)
    return torch.stack([grad.T @ rows for grad, rows in pairs])


@_grouped_weight_gradient.register_fake
def _(grad_MO: Tensor, rows_MI: Tensor, offsets_E: Tensor) -> Tensor:
    return rows_MI.new_empty(offsets_E.shape[0] - 1, grad_MO.shape[1], rows_MI.shape[1])


def _grouped_linear_backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor | None, None]:
    rows_MI, weight, offsets_E = ctx.saved_tensors
    grad_rows = _grouped_linear_op(grad_MO, weight.transpose(1, 2).contiguous(), offsets_E)
    needed = ctx.needs_input_grad[1]
    return grad_rows, _grouped_weight_gradient(grad_MO, rows_MI, offsets_E) if needed else None, None


_grouped_linear_op.register_autograd(
    _grouped_linear_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _grouped_weight_gradient_backward(ctx: Any, grad_EOI: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_MO, rows_MI, offsets_E = ctx.saved_tensors
    turned = grad_EOI.transpose(1, 2).contiguous()
    return _grouped_linear_op(rows_MI, grad_EOI, offsets_E), _grouped_linear_op(grad_MO, turned, offsets_E), None


_grouped_weight_gradient.register_autograd(
    _grouped_weight_gradient_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@register("experts", "torch", autocasts=True)
def experts(rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """See `reference.experts`."""
    lower = autocast_dtype(rows_MD)
    if lower is not None:
        rows, *weights = _lowered(lower, rows_MD, gate_up, down)
        with without_autocast(rows_MD):
            return experts(rows, offsets_E, *weights, activation).to(rows_MD.dtype)
    if activation is F.silu and training.takes(rows_MD, gate_up, down, indices=offsets_E):
        return training.experts(rows_MD, offsets_E, gate_up, down, _experts)
    return _experts(rows_MD, offsets_E, gate_up, down, activation)


def _experts(
    rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation = F.silu
) -> Tensor:
    if is_compiling():
        gate, up = _grouped_linear_op(rows_MD, gate_up, offsets_E).chunk(2, dim=-1)
        return _grouped_linear_op(activation(gate) * up, down, offsets_E)
    dtype, wide, mixed = rows_MD.dtype, _widen(rows_MD, CONVERT_MIN_ROWS), widened.is_mixed(rows_MD, gate_up)
    if transformed():
        if wide or mixed:
            rows_MD, gate_up, down = rows_MD.float(), gate_up.float(), down.float()
        return composable.experts(rows_MD, offsets_E, gate_up, down, activation).to(dtype)
    if mixed:
        return widened.experts(rows_MD, offsets_E, gate_up, down, activation)
    if wide:
        if torch.is_grad_enabled() and (rows_MD.requires_grad or gate_up.requires_grad or down.requires_grad):
            return _experts(rows_MD.float(), offsets_E, gate_up.float(), down.float(), activation).to(dtype)
        return _experts_one_by_one(rows_MD, offsets_E, gate_up, down, activation)
    hidden_MF = gated_unit(_grouped_linear(rows_MD, gate_up, offsets_E), activation)
    return _grouped_linear(hidden_MF, down, offsets_E)


def _lowered(lower: torch.dtype, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Input and weights of grouped products, which autocast leaves alone, in the one dtype that they have under it.

    Off the CPU it is that of single products. On a CPU it is their own: weights would be copied at every call for
    products that are no faster.
    """
    dtype = lower
    if x.device.type == "cpu":
        dtype = x.dtype
        for weight in weights:
            dtype = torch.promote_types(dtype, weight.dtype)
    return tuple(t.to(dtype) for t in (x, *weights))


def _experts_one_by_one(
    rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Inference in half precision on a CPU that only multiplies fp32 well: chosen experts, one at a time."""
    offsets, out = offsets_E.tolist(), torch.empty_like(rows_MD)
    for e in range(gate_up.shape[0]):
        start, end = offsets[e], offsets[e + 1]
        if start == end:
            continue
        x = rows_MD[start:end]
        if end - start >= CONVERT_MIN_ROWS:
            gate, up = matmul_transposed(x.float(), gate_up[e]).chunk(2, dim=-1)
            out[start:end] = matmul_transposed(activation(gate) * up, down[e])
        else:
            gate, up = F.linear(x, gate_up[e]).float().chunk(2, dim=-1)
            out[start:end] = F.linear((activation(gate) * up).to(x.dtype), down[e])
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over parts of tokens, so that (N, V) logits never exist.

    The gradient of a sum needs only the parts' own softmax, so it is computed with the loss and scaled
    by the incoming gradient in backward. A gradient that is to be differentiated is that of the plain formula.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        wide_weight = weight.float() if need_weight else weight  # a frozen one is widened in parts
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(wide_weight) if need_weight else None
        for start in range(0, x.shape[0], CROSS_ENTROPY_TOKENS):
            part = slice(start, start + CROSS_ENTROPY_TOKENS)
            x_part, label = x[part].float(), labels[part]
            used = label != ignore_index
            target = label.where(used, 0).unsqueeze(1)
            logits = matmul_transposed(x_part, wide_weight)
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


@torch.library.custom_op("olmoe::moe", mutates_args=())
def _moe_op(x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`ops.moe` with silu as one node of a compiled graph for inference, which so reaches the C++ kernels."""
    return cast("Tensor", call("moe", AUTO, x, weights_NK, expert_ids_NK, gate_up, down, F.silu))


@_moe_op.register_fake
def _(x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register("moe", "torch", autocasts=True)
def moe(
    x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """The routed experts of one layer: sort, gather, experts, combine. x (N, D) -> (N, D)."""
    if is_compiling() and not torch.is_grad_enabled() and x.device.type == "cpu" and activation is F.silu:
        return _moe_op(x, weights_NK, expert_ids_NK, gate_up, down)
    lower = autocast_dtype(x)
    if lower is not None:
        inputs, *weights = _lowered(lower, x, gate_up, down)
        with without_autocast(x):
            return moe(inputs, weights_NK, expert_ids_NK, *weights, activation).to(x.dtype)
    if mapped(expert_ids_NK):
        return composable.moe(x, weights_NK, expert_ids_NK, gate_up, down, activation)
    if activation is F.silu and training.takes(x, weights_NK, gate_up, down, indices=expert_ids_NK):
        return training.moe(x, weights_NK, expert_ids_NK, gate_up, down, _moe)
    return _moe(x, weights_NK, expert_ids_NK, gate_up, down, activation)


def _moe(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation = F.silu,
) -> Tensor:
    rows = sort_by_expert(expert_ids_NK, gate_up.shape[0])
    out_MD = _experts(gather_rows(x, rows), rows.offsets_E, gate_up, down, activation)
    return combine(out_MD, weights_NK, rows)


@register("linear_cross_entropy", "torch")
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """See `reference.linear_cross_entropy`."""
    if transformed():
        return plain_cross_entropy(x, weight, labels, ignore_index)
    if training.takes(x, weight, indices=labels):

        def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return plain_cross_entropy(x, weight, labels, ignore_index)

        return training.linear_cross_entropy(x, weight, labels, ignore_index, plain)
    return _LinearCrossEntropy.apply(x, weight, labels, ignore_index)
