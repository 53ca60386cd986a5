"""The numerics of OLMoE as functions. Each takes `backend`: "auto" (the fastest that fits) or a name.

`reference` defines every operation; its docstrings carry formulas and shapes. See `dispatch` for the
rule that chooses a backend, and `tests/ops/tolerances.py` for how closely backends must agree.

Shapes legend: B batch, T sequence, N = B*T tokens, D hidden, H heads, G KV heads, Dh head dim,
E experts, K experts per token, M = N*K routed rows, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmoe.errors import UserError
from olmoe.ops import isolated, lowered, reference, sampling, torch_fast  # noqa: F401  (they register their implementations)
from olmoe.ops.autocast import without_autocast
from olmoe.ops.cpu import functional  # noqa: F401
from olmoe.ops.cpu import sampling as _sampling  # noqa: F401
from olmoe.ops.dispatch import AUTO, backends, call
from olmoe.ops.part import chosen_rows, moe_part
from olmoe.ops.reference import Activation
from olmoe.ops.types import RoutePolicy, Samples, SamplingRow, SamplingStatus, SortedRows

__all__ = [
    "AUTO",
    "Activation",
    "RoutePolicy",
    "Samples",
    "SamplingRow",
    "SamplingStatus",
    "SortedRows",
    "apply_rope",
    "attention",
    "backends",
    "chosen_rows",
    "combine",
    "experts",
    "gather_rows",
    "isolated_attention",
    "linear",
    "linear_cross_entropy",
    "moe",
    "moe_part",
    "rms_norm",
    "route",
    "sample",
    "sort_by_expert",
    "without_autocast",
]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> Tensor:
    """x W^T + b with fp32 accumulation. x (..., in), weight (out, in) -> (..., out) in x's dtype.

    With `products`, here and below, products multiply numbers rounded to that dtype, and so do those of gradients;
    what is not a product, and the dtype of results and gradients, stays as it is.
    """
    if products is not None:
        return call("lowered_linear", backend, x, weight, bias, products)
    return call("linear", backend, x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = AUTO) -> Tensor:
    """Root-mean-square norm over the last dimension, statistics in fp32. x (..., D), weight (D,)."""
    return call("rms_norm", backend, x, weight, eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = AUTO) -> Tensor:
    """Rotate-half rotary embedding in fp32. x (..., H, Dh); cos, sin (..., Dh/2) one row a token."""
    return call("apply_rope", backend, x, cos, sin)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Scaled dot-product attention with grouped KV heads. q (B, H, T, Dh), k, v (B, G, S, Dh) -> (B, H, T, Dh).

    `mask` (broadcastable to (B, H, T, S)) is True where attention is allowed; a query that may attend to
    nothing yields zeros. `causal` aligns the last query with the last key.
    """
    if products is not None:
        return call("lowered_attention", backend, q, k, v, mask, causal, products)
    return call("attention", backend, q, k, v, mask, causal)


def isolated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Causal attention within each of several texts that lie end to end. q (N, H, Dh), k, v (N, G, Dh) -> (N, H, Dh).

    Raises `UserError` for `lengths` that are not positive or do not add up to N.
    """
    if sum(lengths) != len(q) or min(lengths, default=1) < 1:
        raise UserError(
            f"Texts of {len(q)} tokens cannot have the lengths {list(lengths)}; give positive ones of that sum."
        )
    return call("isolated_attention", backend, q, k, v, lengths, products)


def route(
    logits: Tensor, k: int, norm_topk_prob: bool = False, policy: RoutePolicy | None = None, *, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in fp32, then top-k. logits (N, E) -> weights (N, K) fp32, expert ids (N, K).

    Without `norm_topk_prob` (OLMoE) the weights are the probabilities themselves and sum to less than 1. With a
    `policy` K is its width; a token that chooses fewer experts has ids of -1 and weights of 0 after them.
    """
    if policy is None:
        return call("route", backend, logits, k, norm_topk_prob)
    kept_NK = torch.arange(policy.width, device=logits.device) < policy.top_k.unsqueeze(1)
    biased_NE = logits.float() + policy.bias
    if policy.pinned is None and policy.temperature is None:
        weights_NK, expert_ids_NK = call("route", backend, biased_NE, policy.width, False)
    else:
        weights_NK, expert_ids_NK = _pinned_and_tempered(biased_NE, policy, kept_NK, backend)
    weights_NK = weights_NK * kept_NK
    total_N1 = weights_NK.sum(dim=-1, keepdim=True)
    # A low temperature can leave nothing for pinned experts.
    renormalized_NK = weights_NK / total_N1.masked_fill(total_N1 == 0, 1.0)
    weights_NK = torch.where(policy.renormalize.unsqueeze(1), renormalized_NK, weights_NK)
    return weights_NK, expert_ids_NK.masked_fill(~kept_NK, -1)


def _pinned_and_tempered(
    logits_NE: Tensor, policy: RoutePolicy, kept_NK: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Weights and expert ids (N, K) by falling probability, those that are not kept last. All experts are ranked."""
    count = logits_NE.shape[-1]
    weights_NE, ids_NE = call("route", backend, logits_NE, count, False)
    ranks_NK = torch.arange(policy.width, device=ids_NE.device).expand(len(ids_NE), -1)
    if policy.pinned is not None:
        pinned_NE = policy.pinned.expand(ids_NE.shape).gather(1, ids_NE)
        ranks_NK = torch.argsort(~pinned_NE, dim=-1, stable=True)[:, : policy.width]
        ranks_NK = ranks_NK.masked_fill(~kept_NK, count - 1).sort(dim=-1).values
    expert_ids_NK = ids_NE.gather(1, ranks_NK)
    if policy.temperature is None:
        return weights_NE.gather(1, ranks_NK), expert_ids_NK
    tempered = call("route", backend, logits_NE / policy.temperature.unsqueeze(1), count, False)
    weights_NE = torch.zeros_like(logits_NE).scatter(1, tempered[1], tempered[0])
    return weights_NE.gather(1, expert_ids_NK), expert_ids_NK


def sort_by_expert(expert_ids_NK: Tensor, num_experts: int, *, backend: str = AUTO) -> SortedRows:
    """Order the N*K routed rows by expert, ties by token (see `SortedRows`)."""
    return call("sort_by_expert", backend, expert_ids_NK, num_experts)


def gather_rows(x: Tensor, rows: SortedRows, *, backend: str = AUTO) -> Tensor:
    """The input of every routed row, in sorted order. x (N, D) -> (M, D)."""
    return call("gather_rows", backend, x, rows)


def experts(
    rows_MD: Tensor,
    offsets_E: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    *,
    backend: str = AUTO,
) -> Tensor:
    """SwiGLU of each expert on its own sorted rows.

    rows (M, D), offsets (E+1,), gate_up (E, 2F, D: gate rows first, then up), down (E, D, F) -> (M, D).
    """
    return call("experts", backend, rows_MD, offsets_E, gate_up, down, activation)


def combine(rows_MD: Tensor, weights_NK: Tensor, rows: SortedRows, *, backend: str = AUTO) -> Tensor:
    """Weighted sum of each token's K rows, in fp32, in the fixed order of k. (M, D), (N, K) -> (N, D)."""
    return call("combine", backend, rows_MD, weights_NK, rows)


def moe(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    *,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> Tensor:
    """The dropless routed experts of one layer: sort, gather, experts, combine. x (N, D) -> (N, D)."""
    if products is not None:
        return call("lowered_moe", backend, x, weights_NK, expert_ids_NK, gate_up, down, activation, products)
    return call("moe", backend, x, weights_NK, expert_ids_NK, gate_up, down, activation)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Cross-entropy of the logits x W^T, summed over tokens whose label is not `ignore_index`; scalar fp32.

    The fast backend never holds all N x V logits. x (N, D), weight (V, D), labels (N,).
    """
    if products is not None:
        return call("lowered_cross_entropy", backend, x, weight, labels, ignore_index, products)
    return call("linear_cross_entropy", backend, x, weight, labels, ignore_index)


def sample(logits: Tensor, rows: list[SamplingRow], allowed: int, *, backend: str = AUTO) -> Samples:
    """The next token of every row, each from its own logits and `SamplingRow` alone. logits (B, V).

    Only the first `allowed` of V can be chosen: rows of an output head beyond the tokenizer's ids are padding.
    """
    assert len(logits) == len(rows)
    assert 0 < allowed <= logits.shape[1]
    for row in rows:
        assert len(row.bias_ids) == len(row.biases)
        assert row.mask is None or (row.mask.dim() == 1 and 32 * len(row.mask) >= allowed)
    return call("sample", backend, logits, rows, allowed)
