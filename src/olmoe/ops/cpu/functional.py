"""The backend "cpu" of `olmoe.ops`: the C++ kernels on plain fp32, bf16 and fp16 tensors, forward only.

Inputs are converted to fp32 and results back to the input's dtype; weights are read in place. Shapes are checked here,
because the kernels do not check them.

Shapes legend: N tokens, D hidden, H heads, Dh head dim, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe.ops.cache import BlockCache, Table, one_block_each
from olmoe.ops.cpu.extension import float_matrix, isa, kernels, unsupported, unsupported_weight, wide
from olmoe.ops.dispatch import register
from olmoe.ops.reference import Activation
from olmoe.runtime import cpu_has_amx, cpu_multiplies_bf16

# Up to this many rows the kernels are used in any case, because reading the weights from memory dominates.
FEW_ROWS = 8
# Narrower single products of many rows are left to torch, whose calls cost less than ours.
WIDE_COLUMNS = 1024
# Experts with up to this many rows each are the kernels', where `many_rows` does not give them all to the kernels: the
# crossover measured with two threads against a torch that multiplies bf16 by instructions for it, and against one that
# converts the weights first (docs/journal/2026-11-24-experts-interface.md).
ROWS_PER_EXPERT = 2
CONVERTED_ROWS_PER_EXPERT = 12


def _linear_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return unsupported(x, bias) or unsupported_weight(weight)


def _few_rows(x: Tensor, weight: Tensor, *rest: object) -> bool:
    return 0 < x.numel() // max(x.shape[-1], 1) <= FEW_ROWS


def many_rows(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply many rows (a prompt) by weights of `dtype` at least as fast as torch does here.

    Measured against torch 2.13 on one core of a Zen 4, 2048 columns, 16 to 512 rows, also with all libraries limited
    to AVX2: a single product in fp32 1.0 to 1.2 times as fast, in bf16 without bf16 instructions (torch then widens
    parts of the weight) 1.05 to 1.3 times, routed experts 1.1 to 1.7 times. With AVX512-BF16 a single product is 0.9
    to 1.1 times as fast as oneDNN's, routed experts 1.1 to 1.8 times; AMX, which ours do not use, is left to torch.
    AVX2 kernels leave prompts to a torch that has AVX-512, whose vectors are twice as wide; kernels for no known
    vectors leave all of them.
    """
    if dtype == torch.bfloat16 and cpu_multiplies_bf16():
        return isa() == "avx512" and not cpu_has_amx()
    return isa() == "avx512" or (isa() == "avx2" and "AVX512" not in torch.backends.cpu.get_cpu_capability())


def _linear_preferred(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return _few_rows(x, weight) or (x.numel() > 0 and x.shape[-1] >= WIDE_COLUMNS and many_rows(weight.dtype))


@register("linear", "cpu", _linear_unsupported, prefer=_linear_preferred)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `ops.linear`."""
    assert weight.dim() == 2
    assert x.shape[-1] == weight.shape[1], (x.shape, weight.shape)
    assert bias is None or bias.shape == weight.shape[:1]
    rows_NC = wide(x).view(-1, x.shape[-1])
    out = torch.empty(len(rows_NC), weight.shape[0])
    offset = None if bias is None else wide(bias)
    kernels().linear(
        float_matrix(weight, x.dtype),
        rows_NC.data_ptr(),
        len(rows_NC),
        0 if offset is None else offset.data_ptr(),
        out.data_ptr(),
    )
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


@register("rms_norm", "cpu", lambda x, weight, eps: unsupported(x) or unsupported_weight(weight), prefer=_few_rows)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    assert weight.shape == x.shape[-1:]
    half = x.dtype != torch.float32  # then the policy rounds before the weight as well
    rows_ND, out = wide(x), torch.empty(x.shape)
    scale = torch.ones(weight.shape) if half else wide(weight)
    kernels().rms_norm(rows_ND.data_ptr(), scale.data_ptr(), eps, x.numel() // x.shape[-1], x.shape[-1], out.data_ptr())
    return weight * out.to(x.dtype) if half else out


@register("apply_rope", "cpu", unsupported, prefer=_few_rows)
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.apply_rope`."""
    heads, head_dim = x.shape[-2:]
    shape = (*x.shape[:-2], head_dim // 2)
    cosines, sines = (wide(t.expand(shape)) for t in (cos, sin))
    out = torch.empty(x.shape).copy_(x)  # the kernel works in place
    tokens = x.numel() // (heads * head_dim)
    kernels().rope(out.data_ptr(), cosines.data_ptr(), sines.data_ptr(), tokens, heads, head_dim)
    return out.to(x.dtype)


@register("route", "cpu", lambda logits, k, norm: unsupported(logits), prefer=lambda logits, k, norm: len(logits) <= 64)
def route(logits: Tensor, k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """See `ops.route`."""
    n, e = logits.shape
    assert 0 < k <= e
    rows_NE = wide(logits)
    weights_NK, ids_NK = torch.empty(n, k), torch.empty(n, k, dtype=torch.long)
    kernels().route(rows_NE.data_ptr(), n, e, k, norm_topk_prob, weights_NK.data_ptr(), ids_NK.data_ptr())
    return weights_NK, ids_NK


def _experts_preferred(rows: int, gate_up: Tensor) -> bool:
    """Whether the kernels compute `rows` routed rows faster than torch, on average over experts. gate_up (E, 2F, D).

    Where `many_rows` leaves prompts to torch, what matters is how often a weight is used once it is read: with few rows
    per expert both wait for memory, which the kernels read faster.
    """
    by_instructions = gate_up.dtype == torch.bfloat16 and cpu_multiplies_bf16()
    limit = ROWS_PER_EXPERT if by_instructions else CONVERTED_ROWS_PER_EXPERT
    return rows > 0 and (rows <= limit * gate_up.shape[0] or many_rows(gate_up.dtype))


def _experts_unsupported(
    x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, activation: Activation, weights_NK: Tensor | None = None
) -> str | None:
    if activation is not F.silu:
        return "its experts compute SwiGLU with silu only"
    reason = unsupported(x, weights_NK, indices)
    return reason or unsupported_weight(gate_up) or unsupported_weight(down)


@register(
    "experts",
    "cpu",
    _experts_unsupported,
    prefer=lambda rows_MD, offsets_E, gate_up, *rest: _experts_preferred(len(rows_MD), gate_up),
)
def experts(rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """See `ops.experts`: `moe` where each row has one expert, of weight 1."""
    ids_M = torch.repeat_interleave(torch.arange(gate_up.shape[0]), offsets_E.diff(), output_size=len(rows_MD))
    return moe(rows_MD, torch.ones(len(rows_MD), 1), ids_M.unsqueeze(1), gate_up, down, activation)


def _moe_unsupported(
    x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> str | None:
    return _experts_unsupported(x, expert_ids_NK, gate_up, down, activation, weights_NK)


def _moe_preferred(x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, *rest: object) -> bool:
    return _experts_preferred(expert_ids_NK.numel(), gate_up)


@register("moe", "cpu", _moe_unsupported, prefer=_moe_preferred)
def moe(
    x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """See `ops.moe`."""
    count, doubled, d = gate_up.shape
    assert down.shape == (count, d, doubled // 2)
    assert x.shape[1] == d
    out = torch.empty(x.shape)
    matrices = float_matrix(gate_up, x.dtype), float_matrix(down, x.dtype)
    run_moe(*matrices, count, doubled // 2, x, weights_NK, expert_ids_NK, out)
    return out.to(x.dtype)


def run_moe(
    gate_up: object,
    down: object,
    num_experts: int,
    width: int,
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    out: Tensor,
) -> None:
    """The kernel on prepared matrices, with the checks of what it indexes by. `out` (N, D) fp32 is written."""
    n, k = expert_ids_NK.shape
    assert weights_NK.shape == (n, k)
    assert x.shape == out.shape
    assert len(x) == n
    rows_ND, weights, ids = wide(x), wide(weights_NK), expert_ids_NK.long().contiguous()
    if n == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= num_experts:
        raise IndexError(f"expert ids from {int(low)} to {int(high)} are not all below {num_experts}")
    kernels().moe(
        gate_up, down, num_experts, width, rows_ND.data_ptr(), weights.data_ptr(), ids.data_ptr(), n, k, out.data_ptr()
    )


def _slots_fit(
    shape: Sequence[int], counts: list[int], lengths: list[int], n: int, kv_heads: int, head_dim: int
) -> bool:
    """Whether a cache of `shape` has slots for `n` tokens, `counts` of each sequence after `lengths` cached ones."""
    batch, _, capacity, _ = shape
    return (
        tuple(shape) == (batch, kv_heads, capacity, head_dim)
        and len(counts) == len(lengths) == batch
        and sum(counts) == n
        and min(counts) >= 0
        and min(lengths) >= 0
        and max(map(add, lengths, counts)) <= capacity
    )


class CachedTokens(NamedTuple):
    """A KV cache of B sequences, to which `counts` new tokens each are to be added after `lengths` that are there.

    keys, values (B, G, capacity, Dh) fp32, bf16 or fp16, contiguous.
    """

    keys: Tensor
    values: Tensor
    counts: list[int]
    lengths: list[int]

    def check(self, n: int, kv_heads: int, head_dim: int) -> None:
        """Assert that `n` new tokens have slots here."""
        keys, values, counts, lengths = self
        assert keys.shape == values.shape
        assert keys.dtype == values.dtype
        assert keys.is_contiguous()
        assert values.is_contiguous()
        fit = _slots_fit(keys.shape, counts, lengths, n, kv_heads, head_dim)
        assert fit, (keys.shape, counts, lengths, n, kv_heads, head_dim)

    def like(self, other: CachedTokens) -> bool:
        """Whether another layer's cache is for the same sequences and of the same shape and dtype."""
        same = self.keys.shape == other.keys.shape and self.keys.dtype == other.keys.dtype
        return same and self.counts == other.counts and self.lengths == other.lengths


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, counts: list[int], lengths: list[int], keys: Tensor, values: Tensor
) -> Tensor:
    """Causal attention of new tokens over a KV cache, to which their keys and values are added first.

    Sequence b has `counts[b]` new tokens after `lengths[b]` cached ones; all new tokens lie end to end. q (N, H, Dh),
    k, v (N, G, Dh); keys, values (B, G, capacity, Dh) fp32, bf16 or fp16, written in place -> (N, H, Dh) in q's dtype.
    """
    CachedTokens(keys, values, counts, lengths).check(len(q), *k.shape[1:])
    return block_attention(q, k, v, counts, lengths, BlockCache([keys], [values]), one_block_each(len(counts)), 0)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, counts: list[int], lengths: list[int], cache: BlockCache, table: Table, layer: int
) -> Tensor:
    """The same over one layer of a cache in blocks, of which each sequence has those of its row of `table` (B, W)."""
    (n, heads, head_dim), kv_heads = q.shape, k.shape[1]
    assert k.shape == v.shape == (n, kv_heads, head_dim)
    assert heads % kv_heads == 0
    assert (cache.kv_heads, cache.head_dim) == (kv_heads, head_dim)
    assert sum(counts) == n
    assert cache.device.type == "cpu"
    cache.check(table, counts, lengths)
    queries, new_keys, new_values, out = wide(q), wide(k), wide(v), torch.empty(n, heads, head_dim)
    kernels().attention(
        queries.data_ptr(),
        new_keys.data_ptr(),
        new_values.data_ptr(),
        counts,
        lengths,
        table,
        heads,
        cache.kernel,
        layer,
        out.data_ptr(),
    )
    return out.to(q.dtype)
