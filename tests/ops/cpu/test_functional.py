"""The backend "cpu" on plain tensors, and attention over a cache, for every instruction set.

tests/ops/test_parity.py has ordinary shapes and dtypes; here are tile borders, threads, extremes and refusals.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.errors import BackendUnavailableError
from olmoe.ops import dispatch, reference, torch_fast
from olmoe.ops.cpu import extension, functional
from olmoe.ops.cpu.extension import float_matrix, kernels
from olmoe.ops.cpu.functional import cached_attention
from ops.cpu.matrices import error, random
from ops.tolerances import forward_tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Weights and inputs: fp32 inputs are never rounded; bf16 by bf16 may use a dedicated instruction.
KINDS = [(dtype, torch.float32) for dtype in DTYPES] + [(torch.bfloat16, torch.bfloat16)]
kinds = pytest.mark.parametrize(("dtype", "inputs"), KINDS, ids=["float32", "bfloat16", "float16", "bfloat16 twice"])


def linear(x, weight, bias=None):
    return ops.linear(x, weight, bias, backend="cpu")


@dtypes
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(4, 16, id="one tile of rows, one vector"),
        pytest.param(1, 1, id="one number"),
        pytest.param(7, 5, id="narrower than any vector"),
        pytest.param(35, 77, id="odd both ways"),
        pytest.param(130, 128, id="several bands of rows"),
        pytest.param(65, 520, id="wider than a piece"),
    ],
)
def test_linear_of_fp32_with_every_kind_of_weight(rows, columns, dtype, isa):
    weight, bias = random(rows, columns, scale=columns**-0.5).to(dtype), random(rows, seed=1)
    x = random(14, columns, seed=2)
    expected = reference.linear(x, weight, bias)
    for tokens in (*range(1, 8), 14):
        assert error(linear(x[:tokens], weight, bias), expected[:tokens]) < forward_tolerance("linear", x.dtype)


@kinds
def test_linear_does_not_depend_on_threads_or_on_other_tokens(dtype, inputs, isa, set_threads):
    weight, x = random(300, 150).to(dtype), random(20, 150, seed=2).to(inputs)
    bias = random(300, seed=1).to(inputs)
    set_threads(1)
    alone = torch.cat([linear(x[i : i + 1], weight, bias) for i in range(20)])
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        for tokens in (1, 2, 3, 5, 6, 7, 11, 20):
            assert torch.equal(linear(x[:tokens], weight, bias), alone[:tokens])


@pytest.mark.parametrize("rows", [1, 4, 8, 15, 67])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 300, 520])
def test_bf16_products_accumulate_in_fp32(rows, columns, isa):
    """Every number of rows and tokens of a tile, and leftover columns: exact products, sums accurate to fp32."""
    weight, x = random(rows, columns, scale=columns**-0.5).bfloat16(), random(14, columns, seed=2).bfloat16().float()
    expected = reference.linear(x, weight.float(), None)
    matrix = extension.float_matrix(weight, torch.bfloat16)
    for tokens in (*range(1, 9), 13, 14):
        out = torch.full((tokens, rows), math.nan)
        extension.kernels().linear(matrix, x.data_ptr(), tokens, 0, out.data_ptr())
        assert (out - expected[:tokens]).abs().max() < forward_tolerance("linear", torch.float32) * expected.abs().max()


def test_activations_are_rounded_to_nearest_and_only_if_they_were_bf16(isa):
    weight, x = torch.ones(5, 40, dtype=torch.bfloat16), torch.ones(2, 40)
    x[0, 0], x[1, 39] = 1 + 3 * 2**-9, 1 + 2**-8  # rounds up; a tie, rounds to even
    assert linear(x, weight).tolist() == [[40 + 3 * 2**-9] * 5, [40 + 2**-8] * 5]
    out = torch.empty(2, 5)
    matrix = extension.float_matrix(weight, torch.bfloat16)
    extension.kernels().linear(matrix, x.data_ptr(), 2, 0, out.data_ptr())
    by_instruction = isa == "avx512"
    assert out.tolist() == ([[40 + 2**-7] * 5, [40.0] * 5] if by_instruction else linear(x, weight).tolist())


@kinds
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(1, 128, id="one row of a tile"),
        pytest.param(15, 129, id="a tile less one, a column more than whole vectors"),
        pytest.param(17, 159, id="a tile and one, columns of no whole block"),
        pytest.param(64, 256, id="whole panels"),
        pytest.param(101, 300, id="panels and a rest, odd both ways"),
        pytest.param(40, 100, id="lanes long enough on narrow vectors only"),
    ],
)
def test_linear_of_many_tokens_equals_each_token_alone_bit_for_bit(rows, columns, dtype, inputs, isa, set_threads):
    """Every number of tokens up to several tiles and a remainder, and more than one block of them."""
    weight, x = random(rows, columns, scale=columns**-0.5).to(dtype), random(600, columns, seed=2).to(inputs)
    set_threads(1)
    alone = torch.cat([linear(x[i : i + 1], weight) for i in range(70)])
    assert error(alone, reference.linear(x[:70], weight, None)) < forward_tolerance("linear", x.dtype)
    for tokens in range(1, 71):
        assert torch.equal(linear(x[:tokens], weight), alone[:tokens]), tokens
    set_threads(3)
    many = linear(x, weight)
    assert torch.equal(many[:70], alone)
    assert error(many, reference.linear(x, weight, None)) < forward_tolerance("linear", x.dtype)


def test_prompts_use_the_faster_backend(isa, monkeypatch):
    """By instruction set and dtype: few rows always use the kernels, narrow products of many rows use torch."""
    native, capability = True, "AVX2"
    monkeypatch.setattr(functional, "cpu_multiplies_bf16", lambda: native)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def chosen(dtype, tokens, width=1024):
        weight, x = torch.zeros(3, width, dtype=dtype), torch.zeros(tokens, width, dtype=dtype)
        names = {functional.linear: "cpu", torch_fast.linear: "torch"}
        return names[dispatch.choose("linear", "auto", x, weight, None)]

    prompts = "torch" if isa == "scalar" else "cpu"
    for dtype in DTYPES:
        assert chosen(dtype, 8) == "cpu"
        assert chosen(dtype, 9, width=256) == "torch"
    for tiles in (False, True):
        monkeypatch.setattr(functional, "cpu_has_amx", lambda tiles=tiles: tiles)
        half = "cpu" if isa == "avx512" and not tiles else "torch"
        assert [chosen(dtype, 9) for dtype in DTYPES] == [prompts, half, prompts]
    native = False
    assert [chosen(dtype, 9) for dtype in DTYPES] == [prompts] * 3
    capability = "AVX512"
    assert chosen(torch.float32, 9) == ("cpu" if isa == "avx512" else "torch")


@pytest.mark.parametrize("tokens", [4, 30], ids=["few", "many"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e38], ids=str)
def test_linear_of_extreme_activations(value, tokens, isa):
    weight, x = random(9, 140, scale=10.0), random(tokens, 140, seed=1)
    clean = linear(x, weight)
    x[2, ::3] = value
    ours = linear(x, weight)
    others = [0, 1, *range(3, tokens)]
    assert torch.equal(ours[others], clean[others])
    assert not torch.isfinite(ours[2]).all()


@pytest.mark.parametrize("width", [1, 3, 16, 33, 67, 200])
def test_rms_norm(width, isa):
    x, weight = random(18, width, scale=3.0), random(width, seed=1)
    x[3], x[4], x[5] = 0, 1e-30, 1e15
    ours, expected = ops.rms_norm(x, weight, 1e-5, backend="cpu"), reference.rms_norm(x, weight, 1e-5)
    for row in range(18):
        assert error(ours[row], expected[row]) < forward_tolerance("rms_norm", x.dtype)


@pytest.mark.parametrize("head_dim", [2, 6, 12, 20, 64, 80, 128])
def test_rope(head_dim, isa):
    angle = random(3, 7, head_dim // 2, seed=1, scale=5.0)
    x = random(3, 7, 5, head_dim)
    ours = ops.apply_rope(x, angle.cos(), angle.sin(), backend="cpu")
    assert error(ours, reference.apply_rope(x, angle.cos(), angle.sin())) < forward_tolerance("apply_rope", x.dtype)


# ---- router ----


def route(logits, k, norm=False):
    return ops.route(logits, k, norm, backend="cpu")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("e", "k"), [(64, 8), (8, 8), (5, 1), (1, 1), (19, 3), (33, 33)])
def test_route(e, k, norm, isa):
    logits = random(70, e, scale=3.0)
    (weights, ids), (expected, expected_ids) = route(logits, k, norm), reference.route(logits, k, norm)
    assert torch.equal(ids, expected_ids)
    assert error(weights, expected) < forward_tolerance("route", logits.dtype)


def test_ties_between_experts_choose_the_lower_id(isa):
    """At any position in a vector or after the last full one."""
    logits = torch.zeros(3, 37)
    logits[1, [36, 20, 5, 33]] = 1.0
    logits[2, 10:] = -math.inf
    weights, ids = route(logits, 6)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [5, 20, 33, 36, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert torch.allclose(weights[2], torch.full((6,), 0.1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nonfinite_logits_still_choose_distinct_experts(value, isa):
    logits = random(4, 20)
    logits[1, 7] = value
    logits[2] = value
    weights, ids = route(logits, 5)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 20 for row in ids.tolist())
    assert torch.isfinite(weights[[0, 3]]).all()
    assert torch.isfinite(weights[1]).all() == (value == -math.inf)


def test_logits_far_apart(isa):
    logits = torch.tensor([[0.0, 1000.0, -1000.0, 999.0], [-3e38, 3e38, 0.0, 3e38]])
    weights, ids = route(logits, 3)
    assert ids.tolist() == [[1, 3, 0], [1, 3, 0]]
    assert torch.allclose(weights, torch.tensor([[0.7310586, 0.2689414, 0.0], [0.5, 0.5, 0.0]]))


# ---- routed experts ----


@kinds
@pytest.mark.parametrize(
    ("n", "e", "k", "d", "f"),
    [
        pytest.param(7, 4, 2, 24, 5, id="experts narrower than a vector"),
        pytest.param(7, 4, 2, 24, 48, id="width of whole groups, not blocks"),
        pytest.param(3, 3, 1, 40, 520, id="experts wider than a piece, K=1"),
        pytest.param(5, 4, 4, 33, 64, id="K=E"),
        pytest.param(90, 3, 1, 16, 32, id="more than 64 rows of an expert"),
    ],
)
def test_moe_with_every_kind_of_weight(n, e, k, d, f, dtype, inputs, isa, set_threads):
    """Bit for bit the same for any number of threads and for one token at a time."""
    x, weights = random(n, d).to(inputs), random(n, k, seed=1)
    ids = torch.stack([torch.randperm(e, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    matrices = random(e, 2 * f, d, seed=2, scale=d**-0.5).to(dtype), random(e, d, f, seed=3, scale=f**-0.5).to(dtype)

    def moe(tokens=slice(None)):
        return ops.moe(x[tokens], weights[tokens], ids[tokens], *matrices, F.silu, backend="cpu")

    ours = moe()
    assert error(ours, reference.moe(x, weights, ids, *matrices, F.silu)) < 2 * forward_tolerance("moe", x.dtype)
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        assert torch.equal(moe(), ours)
    for i in range(min(n, 20)):
        assert torch.equal(moe(slice(i, i + 1)), ours[i : i + 1])


@kinds
def test_moe_of_experts_with_zero_one_and_many_rows(dtype, inputs, isa, set_threads):
    """Row counts around tile sizes and beyond a block of tokens, in widths that are no multiple of a tile."""
    counts, d, f = [0, 1, 5, 16, 19, 0, 300], 140, 133
    ids = torch.cat([torch.full((count, 1), e) for e, count in enumerate(counts)])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    n, e = len(ids), len(counts)
    x, weights = random(n, d).to(inputs), random(n, 1, seed=1)
    matrices = random(e, 2 * f, d, seed=2, scale=d**-0.5).to(dtype), random(e, d, f, seed=3, scale=f**-0.5).to(dtype)

    def moe(tokens=slice(None)):
        return ops.moe(x[tokens], weights[tokens], ids[tokens], *matrices, F.silu, backend="cpu")

    ours = moe()
    assert error(ours, reference.moe(x, weights, ids, *matrices, F.silu)) < 2 * forward_tolerance("moe", x.dtype)
    for threads in (1, 3):
        set_threads(threads)
        assert torch.equal(moe(), ours)
    for i in range(0, n, 7):
        assert torch.equal(moe(slice(i, i + 1)), ours[i : i + 1])


@pytest.mark.parametrize(
    ("dtype", "bf16_instructions", "limit"),
    [
        (torch.float32, True, functional.CONVERTED_ROWS_PER_EXPERT),
        (torch.bfloat16, True, functional.ROWS_PER_EXPERT),
        (torch.bfloat16, False, functional.CONVERTED_ROWS_PER_EXPERT),
    ],
)
def test_the_expert_kernel_is_selected_by_rows_per_expert(dtype, bf16_instructions, limit, monkeypatch):
    """Not by tokens: one token with 4 experts is as many rows as four tokens with one."""
    monkeypatch.setattr(functional, "cpu_multiplies_bf16", lambda: bf16_instructions)
    monkeypatch.setattr(functional, "many_rows", lambda dtype: False)
    gate_up, down = torch.ones(4, 2, 1, dtype=dtype), torch.ones(4, 1, 1, dtype=dtype)
    for tokens, k, chosen in [(limit, 4, True), (limit + 1, 4, False), (limit * 4, 1, True), (limit * 4 + 1, 1, False)]:
        x, ids = torch.ones(tokens, 1, dtype=dtype), torch.zeros(tokens, k, dtype=torch.long)
        function = dispatch.choose("moe", "auto", x, torch.ones(tokens, k), ids, gate_up, down, F.silu)
        assert (function is functional.moe) == chosen, (tokens, k)
        rows, offsets = torch.ones(tokens * k, 1, dtype=dtype), torch.tensor([0, tokens * k, *[tokens * k] * 3])
        function = dispatch.choose("experts", "auto", rows, offsets, gate_up, down, F.silu)
        assert (function is functional.experts) == chosen, (tokens, k)


def test_gates_far_below_zero_give_zero(isa):
    """silu(-1e30) is 0, whatever it is multiplied by."""
    gate_up, down = torch.ones(1, 2 * 19, 4), torch.ones(1, 4, 19)
    gate_up[:, :19] = -1e30
    out = ops.moe(
        torch.ones(2, 4), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long), gate_up, down, F.silu, backend="cpu"
    )
    assert not out.abs().gt(1e-30).any()


# ---- attention over a cache ----

CASES = [
    # heads, kv heads, head dim, cached tokens, new tokens
    pytest.param(4, 4, 16, [0], [9], id="a prompt"),
    pytest.param(4, 2, 16, [0, 0, 0], [5, 1, 20], id="prompts of a batch"),
    pytest.param(4, 2, 32, [0, 70, 3], [130, 66, 64], id="prompts of several blocks of queries"),
    pytest.param(4, 4, 16, [70], [1], id="decoding past one block of keys"),
    pytest.param(6, 2, 32, [3, 63, 64, 127, 0], [1, 1, 1, 1, 1], id="decoding: lengths around the block of keys"),
    pytest.param(4, 1, 32, [50, 0, 129], [37, 3, 18], id="prompts after a cached prefix, one KV head"),
    pytest.param(2, 2, 12, [5, 66], [17, 1], id="12: less than a vector"),
    pytest.param(2, 1, 20, [5, 66], [17, 1], id="20: a vector and a rest"),
    pytest.param(2, 2, 80, [5, 66], [17, 1], id="80: wider than four vectors"),
    pytest.param(2, 2, 128, [61, 130], [70, 1], id="128: OLMoE's own"),
    pytest.param(2, 1, 2, [0, 3], [4, 0], id="2: the least; a sequence without new tokens"),
]  # fmt: skip


class Attention:
    """Queries, keys and values, and a cache that holds NaN wherever nothing has been written."""

    def __init__(self, heads, kv_heads, head_dim, lengths, counts, dtype, scale=1.0):
        self.counts, self.lengths, n = counts, lengths, sum(counts)
        self.q, self.k, self.v = (
            random(n, h, head_dim, seed=i, scale=scale) for i, h in enumerate((heads, kv_heads, kv_heads))
        )
        capacity = max(length + count for length, count in zip(lengths, counts, strict=True)) + 3
        self.keys, self.values = (
            random(len(counts), kv_heads, capacity, head_dim, seed=i, scale=scale).to(dtype) for i in (5, 6)
        )
        for b, length in enumerate(lengths):
            self.keys[b, :, length:] = self.values[b, :, length:] = math.nan

    def run(self, function, rows=None):
        """The result and the resulting cache; `rows` selects one sequence."""
        keys, values = self.keys.clone(), self.values.clone()
        out = function(self.q, self.k, self.v, self.counts, self.lengths, keys, values)
        return out, keys, values

    def alone(self, b):
        """Sequence b without the others."""
        start = sum(self.counts[:b])
        tokens = slice(start, start + self.counts[b])
        keys, values = self.keys[b : b + 1].clone(), self.values[b : b + 1].clone()
        inputs = self.q[tokens], self.k[tokens], self.v[tokens], [self.counts[b]], [self.lengths[b]]
        return cached_attention(*inputs, keys, values)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "lengths", "counts"), CASES)
def test_cached_attention(heads, kv_heads, head_dim, lengths, counts, dtype, isa, set_threads):
    """With grouped heads; bit for bit the same for any number of threads and for one sequence at a time."""
    case = Attention(heads, kv_heads, head_dim, lengths, counts, dtype)
    set_threads(1)
    (ours, *cache), (expected, *expected_cache) = case.run(cached_attention), case.run(reference.cached_attention)
    assert error(ours, expected) < forward_tolerance("cached_attention", ours.dtype)
    for left, right in zip(cache, expected_cache, strict=True):
        assert torch.equal(left.nan_to_num(99.0), right.nan_to_num(99.0))
    for threads in (2, 3, 5):
        set_threads(threads)
        assert torch.equal(case.run(cached_attention)[0], ours)
    assert torch.equal(torch.cat([case.alone(b) for b in range(len(counts))]), ours)


@dtypes
def test_cached_attention_of_half_precision_queries(dtype, isa):
    case = Attention(4, 2, 16, [3, 0], [2, 5], torch.float32)
    case.q, case.k, case.v = (t.to(dtype) for t in (case.q, case.k, case.v))
    (ours, *_), (expected, *_) = case.run(cached_attention), case.run(reference.cached_attention)
    assert ours.dtype == dtype
    assert error(ours, expected) <= forward_tolerance("cached_attention", dtype)


@pytest.mark.parametrize("counts", [[1], [18]], ids=["decoding", "prompt"])
def test_attention_to_a_single_dominant_key(counts, isa):
    """Scores thousands apart: the largest takes all the weight at any position, and nothing overflows."""
    case = Attention(2, 2, 16, [130], counts, torch.float32, scale=30.0)
    (ours, *_), (expected, *_) = case.run(cached_attention), case.run(reference.cached_attention)
    assert error(ours, expected) < 1e-3  # the last bit of a score of 4000 is 2**-12, and its exponential follows


@pytest.mark.parametrize("counts", [[1], [18]], ids=["decoding", "prompt"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nonfinite_keys_and_values_stay_within_their_head_and_sequence(counts, value, isa):
    case = Attention(2, 2, 16, [70, 70], counts * 2, torch.float32)
    clean = case.run(cached_attention)[0]
    case.keys[0, 1, 5, 3] = value
    ours = case.run(cached_attention)[0]
    assert torch.equal(ours[:, 0], clean[:, 0])
    assert torch.equal(ours[counts[0] :], clean[counts[0] :])


def test_conversion_to_the_cache_rounds_like_torch(isa):
    """Halves to even, denormals, overflow to infinity, infinities and NaN."""
    bits = torch.arange(0, 2**16, 7, dtype=torch.int32)
    exact = bits.to(torch.int16).view(torch.float16).float()
    between = torch.cat([exact, exact * (1 + 2**-11), exact * (1 + 2**-9), exact * 2.0**100, exact * 2.0**-130])
    between = torch.cat([between, torch.tensor([65519.0, 65520.0, 65536.0, math.inf, -math.inf, math.nan])])
    v = torch.cat([between, torch.zeros(-len(between) % 64)]).view(-1, 1, 16)
    counts = [4] * (len(v) // 4)
    for dtype in DTYPES:
        keys, values = (torch.zeros(len(counts), 1, 4, 16, dtype=dtype) for _ in range(2))
        cached_attention(torch.zeros_like(v), torch.zeros_like(v), v, counts, [0] * len(counts), keys, values)
        ours, expected = values.view(-1), v.to(dtype).view(-1)
        number = ~expected.isnan()
        assert torch.equal(ours[number], expected[number])
        assert ours[~number].isnan().all()


def test_every_half_precision_value_is_read_exactly(isa):
    """Including signed zeros, subnormals, infinities and NaN, in vectors and one by one."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        table = bits.view(dtype)
        for columns in (2**16, 32, 1):
            rows = table.view(-1, columns)
            ids = torch.arange(len(rows))
            ours = torch.full(rows.shape, 7.0)
            kernels().embed(float_matrix(rows), ids.data_ptr(), len(ids), ours.data_ptr())
            number = ~rows.isnan()
            assert torch.equal(ours[number].view(torch.int32), rows.float()[number].view(torch.int32))
            assert ours[~number].isnan().all()


# ---- what the kernels refuse ----


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.zeros(2, 4).double(), torch.zeros(3, 4).double(), "does not support torch.float64"),
        (torch.zeros(2, 4, requires_grad=True), torch.zeros(3, 4), "no gradients"),
        (torch.zeros(2, 4), torch.zeros(3, 4, requires_grad=True), "no gradients"),
        (torch.zeros(2, 4), torch.zeros(4, 3).T, "not contiguous"),
        (torch.zeros(2, 4), torch.zeros(3, 4, device="meta"), "not on meta"),
        (torch.zeros(2, 4, device="meta"), torch.zeros(3, 4), "not on meta"),
        (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int8), "weights of torch.int8"),
        (torch.zeros(2, 0), torch.zeros(3, 0), "empty"),
        (torch.zeros(2, 4).as_subclass(type("Mine", (torch.Tensor,), {})), torch.zeros(3, 4), "type Mine"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_inputs_that_linear_refuses_or_leaves_to_torch(x, weight, reason):
    with pytest.raises(BackendUnavailableError, match=f"'cpu' cannot run linear here: .*{reason}"):
        linear(x, weight)
    if "meta" not in reason:
        ops.linear(x, weight.to(x.dtype))


def test_every_operand_is_checked():
    """A gradient or another device on any operand counts."""
    x, grad, meta = torch.zeros(2, 4), torch.zeros(3, requires_grad=True), torch.zeros(3, device="meta")
    weights = torch.ones(2, 1)
    ids, gate_up, down = torch.zeros(2, 1, dtype=torch.long), torch.zeros(1, 6, 4), torch.zeros(1, 4, 3)
    calls = [
        lambda: linear(x, torch.zeros(3, 4), grad),
        lambda: linear(x, torch.zeros(3, 4), meta),
        lambda: ops.rms_norm(x, grad, 1e-5, backend="cpu"),
        lambda: ops.apply_rope(torch.zeros(3, 2, 2), grad.view(3, 1), grad.view(3, 1), backend="cpu"),
        lambda: ops.moe(x, weights.clone().requires_grad_(), ids, gate_up, down, F.silu, backend="cpu"),
        lambda: ops.moe(x, weights, ids, gate_up, down.clone().requires_grad_(), F.silu, backend="cpu"),
        lambda: ops.moe(x, weights, ids.to("meta"), gate_up, down, F.silu, backend="cpu"),
        lambda: ops.moe(x, weights, ids, gate_up, down, F.gelu, backend="cpu"),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailableError):
            call()
    with torch.no_grad():
        assert linear(x, torch.zeros(3, 4), grad).shape == (2, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_compiled_graphs_hold_no_addresses():
    weight, x = random(3, 4), random(2, 4, seed=1)
    traced = torch.jit.trace(lambda x: ops.linear(x, weight), random(2, 4, seed=2), check_trace=False)
    assert torch.allclose(traced(x), ops.linear(x, weight))
    compiled = torch.compile(lambda x: ops.linear(x, weight), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), ops.linear(x, weight))


def test_empty_batches():
    assert linear(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert linear(torch.zeros(2, 0, 4), torch.zeros(3, 4)).shape == (2, 0, 3)
    assert ops.rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-5, backend="cpu").shape == (0, 4)
    assert [t.shape for t in route(torch.zeros(0, 4), 2)] == [(0, 2), (0, 2)]
    cache = torch.zeros(1, 1, 3, 4)
    assert cached_attention(*[torch.zeros(0, 1, 4)] * 3, [0], [0], cache, cache.clone()).shape == (0, 1, 4)
