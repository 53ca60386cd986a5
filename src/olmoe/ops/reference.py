"""Ground truth: every operation in plain torch, written to be audited, differentiable, without speed tricks.

Shapes legend: B batch, T sequence, N = B*T tokens, D hidden, H heads, G KV heads, Dh head dim,
E experts, K experts per token, M = N*K routed rows, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from olmoe.ops.dispatch import register
from olmoe.ops.types import SortedRows

Activation = Callable[[Tensor], Tensor]


@register("linear", "reference")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + b, accumulated in fp32. x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@register("rms_norm", "reference")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w * (x / sqrt(mean(x^2) + eps)): statistics in fp32, cast back before the weight. x (..., D)."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@register("apply_rope", "reference")
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE in fp32. x (..., H, Dh); cos, sin (..., Dh/2), one row a token -> (..., H, Dh)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., 1, Dh/2): the same for every head
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@register("attention", "reference")
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v. q (B, H, T, Dh), k and v (B, G, S, Dh), mask broadcastable to (B, H, T, S).

    `mask` is True where attention is allowed. `causal` aligns the last query with the last key.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, Dh)
    scores = (q.float() @ k.float().transpose(-1, -2)) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if causal:
        t, s = scores.shape[-2:]
        allowed = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
        mask = allowed if mask is None else mask & allowed
    if mask is None:
        return (scores.softmax(dim=-1) @ v.float()).to(q.dtype)
    # A row that may attend to nothing (padding) yields zeros, not NaN, and so do its derivatives of every order.
    some = mask.any(dim=-1, keepdim=True)
    probabilities = scores.masked_fill(~mask & some, float("-inf")).softmax(dim=-1).masked_fill(~some, 0.0)
    return (probabilities @ v.float()).to(q.dtype)


@register("route", "reference")
def route(logits: Tensor, k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Top-k of softmax over all experts (paper Eq. 1). logits (N, E) -> weights (N, K) fp32, expert ids (N, K).

    The weights are used as they are (their sum is below 1) unless `norm_topk_prob` renormalises them.
    """
    weights_NK, expert_ids_NK = torch.topk(logits.float().softmax(dim=-1), k, dim=-1)
    if norm_topk_prob:
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
    return weights_NK, expert_ids_NK


@register("sort_by_expert", "reference")
def sort_by_expert(expert_ids_NK: Tensor, num_experts: int) -> SortedRows:
    """Order the N*K routed rows by expert, ties by token; see `SortedRows`."""
    n, k = expert_ids_NK.shape
    flat = expert_ids_NK.reshape(-1).tolist()
    order = sorted(range(n * k), key=lambda row: flat[row])  # Python's sort is stable
    position = [0] * (n * k)
    for sorted_row, row in enumerate(order):
        position[row] = sorted_row
    offsets = [sum(expert < e for expert in flat) for e in range(num_experts + 1)]
    device = expert_ids_NK.device
    order_M = torch.tensor(order, dtype=torch.long, device=device)
    return SortedRows(
        order_M=order_M,
        token_ids_M=order_M // k,
        position_NK=torch.tensor(position, dtype=torch.long, device=device).view(n, k),
        offsets_E=torch.tensor(offsets, dtype=torch.long, device=device),
    )


@register("gather_rows", "reference")
def gather_rows(x: Tensor, rows: SortedRows) -> Tensor:
    """The input of every routed row, in sorted order. x (N, D) -> (M, D)."""
    return x[rows.token_ids_M]


@register("experts", "reference")
def experts(rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """SwiGLU of each expert on its own rows: down(act(gate x) * up x), accumulated in fp32.

    rows (M, D) sorted by expert, offsets (E+1,), gate_up (E, 2F, D: gate rows first), down (E, D, F) -> (M, D).
    """
    offsets, outputs = offsets_E.tolist(), []
    for e in range(gate_up.shape[0]):
        x = rows_MD[offsets[e] : offsets[e + 1]].float()
        gate, up = (x @ gate_up[e].float().T).chunk(2, dim=-1)
        outputs.append((activation(gate) * up) @ down[e].float().T)
    return torch.cat(outputs).to(rows_MD.dtype)


@register("combine", "reference")
def combine(rows_MD: Tensor, weights_NK: Tensor, rows: SortedRows) -> Tensor:
    """y_n = sum_k w_nk * row(n, k), summed in fp32 in the fixed order of k. (M, D), (N, K) -> (N, D)."""
    y_NKD = rows_MD[rows.position_NK].float()
    return (weights_NK.float().unsqueeze(-1) * y_NKD).sum(dim=1).to(rows_MD.dtype)


@register("moe", "reference")
def moe(
    x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """The routed experts of one layer: sort, gather, experts, combine. x (N, D) -> (N, D)."""
    rows = sort_by_expert(expert_ids_NK, gate_up.shape[0])
    out_MD = experts(gather_rows(x, rows), rows.offsets_E, gate_up, down, activation)
    return combine(out_MD, weights_NK, rows)


@register("linear_cross_entropy", "reference")
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Sum over tokens of -log softmax(x W^T)[label]. x (N, D), weight (V, D), labels (N,) -> scalar fp32."""
    logits_NV = x.float() @ weight.float().T
    return torch.nn.functional.cross_entropy(logits_NV, labels, ignore_index=ignore_index, reduction="sum")


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of x rounded to `dtype`, in x's own dtype. Gradients pass as they are."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()  # the difference of neighbours is exact


@register("lowered_linear", "reference")
def lowered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear` of x and weight rounded to `dtype`, and nothing else: not the result.

    Here and below, the products of gradients multiply rounded factors, too; faster backends also round what arrives.
    """
    return linear(rounded(x, dtype), rounded(weight, dtype), bias)


@register("lowered_attention", "reference")
def lowered_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> Tensor:
    """`attention` of q, k and v rounded to `dtype`. Faster backends also round probabilities before they multiply v."""
    return attention(*(rounded(t, dtype) for t in (q, k, v)), mask, causal)


@register("isolated_attention", "reference")
def isolated_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], products: torch.dtype | None) -> Tensor:
    """Causal attention within each of several texts that lie end to end. q (N, H, Dh), k and v (N, G, Dh)."""
    outputs = []
    for text in zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True):
        heads = [t.transpose(0, 1).unsqueeze(0) for t in text]
        lowered = products is not None
        out = lowered_attention(*heads, None, True, products) if lowered else attention(*heads, None, True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@register("lowered_moe", "reference")
def lowered_moe(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    dtype: torch.dtype,
) -> Tensor:
    """`moe` whose experts multiply numbers rounded to `dtype`: those of x, of weights, and of the gated unit."""
    rows = sort_by_expert(expert_ids_NK, gate_up.shape[0])
    rows_MD, offsets, outputs = rounded(gather_rows(x, rows).float(), dtype), rows.offsets_E.tolist(), []
    for e, (first, second) in enumerate(zip(gate_up.float(), down.float(), strict=True)):
        gate, up = (rows_MD[offsets[e] : offsets[e + 1]] @ rounded(first, dtype).T).chunk(2, dim=-1)
        outputs.append(rounded(activation(gate) * up, dtype) @ rounded(second, dtype).T)
    return combine(torch.cat(outputs), weights_NK, rows).to(x.dtype)


@register("lowered_cross_entropy", "reference")
def lowered_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """`linear_cross_entropy` of x and weight rounded to `dtype`."""
    return linear_cross_entropy(rounded(x.float(), dtype), rounded(weight.float(), dtype), labels, ignore_index)


# What the C++ kernels define beyond the operations above. They differentiate nothing and have no other backend.


def round_activations(x: Tensor) -> Tensor:
    """x in the int8 blocks that packed matrices are multiplied with, as the fp32 numbers they stand for. (..., C).

    Per block of 32: d = max|x| / 127, q = x * (1/d) rounded to the nearest, halves to even; the value is d * q. A block
    whose 1/d is not finite (zeros, denormals) is zero, and one that holds an infinity or a NaN is all NaN.
    """
    blocks = x.float().unflatten(-1, (-1, 32))
    d = blocks.abs().amax(dim=-1, keepdim=True) / 127
    inverse = 1 / d
    q = torch.where(torch.isfinite(inverse), blocks * inverse, 0.0).round()
    return torch.where(torch.isfinite(d), d * q, torch.nan).flatten(-2)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = round(x) W^T + b for a packed matrix that decodes to `weight` (out, in). x (..., in) -> (..., out)."""
    return linear(round_activations(x), weight, bias).to(x.dtype)


def packed_moe(x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`moe` with silu where the input of either matrix is rounded to int8 blocks; the matrices are decoded ones."""
    y_ND = torch.zeros(x.shape, dtype=torch.float32)
    for slot in range(expert_ids_NK.shape[1]):
        for n, e in enumerate(expert_ids_NK[:, slot].tolist()):
            gate, up = packed_linear(x[n].float(), gate_up[e], None).chunk(2)
            hidden_F = torch.nn.functional.silu(gate) * up
            y_ND[n] += weights_NK[n, slot].float() * packed_linear(hidden_F, down[e], None)
    return y_ND.to(x.dtype)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, counts: list[int], lengths: list[int], keys: Tensor, values: Tensor
) -> Tensor:
    """Attention of new tokens over a KV cache in fp32, after their keys and values, rounded to its dtype, are in it.

    Sequence b has `counts[b]` of the N new tokens, which lie end to end, after `lengths[b]` cached ones.
    q (N, H, Dh), k, v (N, G, Dh); keys, values (B, G, capacity, Dh) are written in place -> (N, H, Dh).
    """
    outputs, parts = [], zip(*(t.split(counts) for t in (q, k, v)), strict=True)
    for b, (q_T, k_T, v_T) in enumerate(parts):
        seen = lengths[b] + counts[b]
        keys[b, :, lengths[b] : seen], values[b, :, lengths[b] : seen] = k_T.transpose(0, 1), v_T.transpose(0, 1)
        cached = (t[b : b + 1, :, :seen].float() for t in (keys, values))
        outputs.append(attention(q_T.float().transpose(0, 1).unsqueeze(0), *cached, None, True)[0].transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)
