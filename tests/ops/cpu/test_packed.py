"""Products with packed matrices against the reference: shapes, extreme values, threads, batches."""

from __future__ import annotations

import math

import pytest
import torch

from olmoe.ops import reference
from olmoe.ops.cpu.packed import packed_embedding, packed_linear, packed_moe
from ops.cpu.matrices import FORMATS, Packed, error, from_codes, pack, random
from ops.tolerances import forward_tolerance

formats = pytest.mark.parametrize("format", FORMATS)


def multiply(x, w: Packed, bias=None):
    return packed_linear(x, w.codes, w.format, *w.values.shape, bias)


@formats
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(16, 32, id="one block of one group"),
        pytest.param(1, 32, id="one row in a group of 16"),
        pytest.param(7, 32, id="less than half a group"),
        pytest.param(9, 96, id="more than half a group, odd blocks"),
        pytest.param(33, 64, id="a pair of groups and one row"),
        pytest.param(48, 160, id="an odd number of groups"),
        pytest.param(57, 96, id="the second group of a pair is not full"),
        pytest.param(64, 64, id="four groups, which one token reads side by side"),
        pytest.param(80, 32, id="four groups and one"),
        pytest.param(600, 544, id="several pieces of work"),
    ],
)
def test_linear(rows, columns, format, isa):
    """Every number of tokens up to 20, each of which is a different sequence of tiles."""
    w, bias = pack(format, random(rows, columns, scale=columns**-0.5)), random(rows, seed=1)
    x = random(20, columns, seed=2)
    expected = reference.packed_linear(x, w.values, bias)
    for tokens in range(1, 21) if rows < 100 else (1, 7, 20):
        assert error(multiply(x[:tokens], w, bias), expected[:tokens]) < forward_tolerance("packed_linear", x.dtype)


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_of_half_precision_strided_and_empty_inputs(format, dtype, isa):
    w = pack(format, random(40, 64, scale=0.1))
    x = random(64, 5, seed=1).to(dtype).T  # non-contiguous columns
    ours = multiply(x, w)
    assert error(ours, reference.packed_linear(x, w.values, None)) <= forward_tolerance("packed_linear", dtype)
    assert torch.equal(multiply(x.view(1, 5, 64), w), ours.unsqueeze(0))
    assert multiply(x[:0], w).shape == (0, 40)


@formats
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-36, 1e-40], ids=str)
def test_linear_of_very_large_and_very_small_activations(format, magnitude, isa):
    w = pack(format, random(24, 64))
    x = random(5, 64, seed=1)
    x[1] = 0
    x[2, :32] = 0
    x *= magnitude
    ours, expected = multiply(x, w), reference.packed_linear(x, w.values, None)
    scale = max(float(expected.abs().max()), 1e-37)  # below it results are denormal
    assert float((ours - expected).abs().max()) < 3e-6 * scale
    assert not ours[1].any()


@formats
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_nonfinite_activations_affect_only_their_token(format, value, isa):
    w = pack(format, random(20, 96))
    x = random(9, 96, seed=1)
    clean = multiply(x, w)
    x[3, 40] = value
    ours = multiply(x, w)
    others = torch.arange(9) != 3
    assert torch.equal(ours[others], clean[others])
    assert not torch.isfinite(ours[3]).any()


@formats
def test_codes_and_scales_at_their_limits(format, isa):
    """The largest codes of one sign against activations of one sign sum highest; the smallest ones lowest."""
    top = {"q4_0": 15, "q5_0": 31, "q8_0": 255}[format]
    codes = torch.randint(0, top + 1, (21, 64), generator=torch.Generator().manual_seed(0))
    codes[0], codes[1] = 0, top  # -8 or -128; 7 or 127
    scales = random(21, 2, seed=1)  # of either sign
    scales[2], scales[3], scales[4] = 0.0, 2.0**-24, -(2.0**-15)  # zero, the smallest denormal, another denormal
    scales[5] = 65504.0
    w = from_codes(format, codes, scales)
    ones = torch.ones(1, 64)
    x = torch.cat([ones, -ones, random(4, 64, seed=2)])
    ours, expected = multiply(x, w), reference.packed_linear(x, w.values, None)
    largest = expected.abs().amax(dim=0).clamp(min=1e-30)  # row by row: scales differ by ten orders of magnitude
    assert float(((ours - expected).abs().amax(dim=0) / largest).max()) < 3e-6
    assert not ours[:, 2].any()
    assert (ours[:, 3] != 0).any()


@formats
def test_linear_does_not_depend_on_threads_or_on_other_tokens(format, isa, set_threads):
    w, bias = pack(format, random(1000, 512)), random(1000, seed=1)
    x = random(20, 512, seed=2)
    set_threads(1)
    alone = torch.cat([multiply(x[i : i + 1], w, bias) for i in range(20)])
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        for tokens in (1, 2, 3, 5, 8, 13, 20):
            assert torch.equal(multiply(x[:tokens], w, bias), alone[:tokens])


@formats
def test_embeddings_equal_decoded_rows_bit_for_bit(format, isa):
    w = pack(format, random(35, 96))
    ids = torch.tensor([[0, 34, 15], [16, 31, 34]])
    ours = packed_embedding(ids, w.codes, format, 35, 96)
    assert torch.equal(ours, w.values[ids])
    assert torch.equal(packed_embedding(ids.int()[:, ::2], w.codes, format, 35, 96), w.values[ids[:, ::2]])
    assert packed_embedding(ids[:0], w.codes, format, 35, 96).shape == (0, 3, 96)
    for outside in (-1, 35):  # 35 is within the last group of 16 rows
        with pytest.raises(IndexError, match="are not all below 35"):
            packed_embedding(torch.tensor([0, outside]), w.codes, format, 35, 96)


# ---- routed experts ----

MIXTURES = [
    # tokens, experts, chosen, hidden, width, which experts
    pytest.param(9, 8, 3, 64, 32, "random", id="width of one block"),
    pytest.param(20, 8, 3, 96, 64, "random", id="width of two blocks"),
    pytest.param(1, 8, 2, 32, 96, "random", id="one token, most experts empty"),
    pytest.param(11, 4, 1, 64, 32, "random", id="K=1"),
    pytest.param(5, 4, 4, 32, 64, "random", id="K=E"),
    pytest.param(70, 6, 2, 32, 32, "first", id="two experts get all, in two batches of 64 rows"),
    pytest.param(13, 6, 1, 32, 32, "last", id="the last expert gets all"),
]


def mixture(n, e, k, d, f, which, formats):
    x, weights = random(n, d), random(n, k, seed=1).softmax(dim=-1)
    ids = {"first": torch.arange(k), "last": torch.arange(e - k, e)}.get(which, torch.zeros(k, dtype=torch.long))
    ids = ids.expand(n, k).contiguous()
    if which == "random":
        ids = torch.stack([torch.randperm(e, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    gate_up, down = (
        pack(formats[0], random(e, 2 * f, d, seed=2, scale=d**-0.5)),
        pack(formats[1], random(e, d, f, seed=3)),
    )
    return x, weights, ids, gate_up, down


def mix(x, weights, ids, gate_up, down):
    return packed_moe(x, weights, ids, gate_up[:2], down[:2], down.values.shape[-1])


@pytest.mark.parametrize(
    "formats", [("q4_0", "q4_0"), ("q8_0", "q8_0"), ("q5_0", "q5_0"), ("q4_0", "q8_0")], ids="/".join
)
@pytest.mark.parametrize(("n", "e", "k", "d", "f", "which"), MIXTURES)
def test_moe(n, e, k, d, f, which, formats, isa):
    x, weights, ids, gate_up, down = mixture(n, e, k, d, f, which, formats)
    ours = mix(x, weights, ids, gate_up, down)
    expected = reference.packed_moe(x, weights, ids, gate_up.values, down.values)
    assert error(ours, expected) < 1 / 127
    # The last bits of a hidden value can round it to another int8; for a few values they do.
    differences = (ours - expected).abs() / expected.abs().max()
    assert float((differences > forward_tolerance("packed_moe", x.dtype)).float().mean()) < 0.05


def test_experts_without_tokens_are_not_read(isa):
    x, weights, ids, gate_up, down = mixture(5, 4, 2, 32, 32, "first", FORMATS)
    expected = mix(x, weights, ids, gate_up, down)
    for matrix in (gate_up, down):
        matrix.codes[2:] = 0xFF  # NaN scales
    assert torch.equal(mix(x, weights, ids, gate_up, down), expected)


@pytest.mark.parametrize("formats", [("q4_0", "q4_0"), ("q8_0", "q8_0")], ids="/".join)
def test_moe_does_not_depend_on_threads_or_on_other_tokens(formats, isa, set_threads):
    x, weights, ids, gate_up, down = mixture(20, 6, 3, 256, 160, "random", formats)
    set_threads(1)
    alone = torch.cat([mix(x[i : i + 1], weights[i : i + 1], ids[i : i + 1], gate_up, down) for i in range(20)])
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        for n in (1, 2, 7, 20):
            assert torch.equal(mix(x[:n], weights[:n], ids[:n], gate_up, down), alone[:n])


@pytest.mark.parametrize("value", [1e30, 1e-30, 0.0, math.inf, math.nan], ids=str)
def test_moe_of_extreme_activations(value, isa):
    x, weights, ids, gate_up, down = mixture(6, 5, 2, 64, 32, "random", FORMATS)
    clean = mix(x, weights, ids, gate_up, down)
    x[2] = value
    ours = mix(x, weights, ids, gate_up, down)
    others = torch.arange(6) != 2
    assert torch.equal(ours[others], clean[others])
    if value in (0.0, 1e-30):
        assert not ours[2].any()
    else:
        assert not torch.isfinite(ours[2]).all()  # the product of gate and up is beyond fp32


def test_expert_ids_out_of_range_are_refused():
    x, weights, ids, gate_up, down = mixture(3, 4, 2, 32, 32, "random", FORMATS)
    for outside in (-1, 4):
        ids[1, 1] = outside
        with pytest.raises(IndexError, match="are not all below 4"):
            mix(x, weights, ids, gate_up, down)
    assert mix(x[:0], weights[:0], ids[:0], gate_up, down).shape == (0, 32)
