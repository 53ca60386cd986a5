"""Codes chosen by the kernels against torch's: the same bytes for every shape, value and number of threads."""

from __future__ import annotations

import pytest
import torch

from olmoe.errors import CheckpointError
from olmoe.ops.cpu import encode, extension
from olmoe.quant import Q4_0, Q5_0, Q8_0, search
from olmoe.quant.formats import CODES
from ops.cpu.matrices import random

formats = pytest.mark.parametrize("format", [Q4_0(), Q5_0()], ids=lambda f: f.name)


def factor_of(columns, seed=1):
    """The factor of correlated inputs, as hidden states are."""
    x = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return search.Inputs(x.T @ x / len(x)).factor


def by_torch(format, weight, factor):
    if factor is None:
        chosen = search.search(format, weight.float().reshape(-1, 32), torch.ones(()))
    else:
        chosen = search.compensate(format, weight, factor)
    return format.pack(*chosen, len(weight))


def ordinary(rows, columns, dtype):
    return random(rows, columns, scale=0.03).to(dtype)


def extreme(rows, columns, dtype):
    """Blocks of signed zeros, of equal magnitudes, of values at the limits of scales, and of whole numbers."""
    w = random(rows, columns, scale=0.03)
    w[0], w[1], w[2], w[2, ::2], w[3] = 0.0, -0.0, 0.0, -0.0, 0.5
    w[4], w[4, ::3], w[5], w[6] = -0.25, 0.25, w[5] * 1e-6, w[6] * 1e5
    w[7], w[8, 5] = w[7].sign() * 2e-7, 100.0
    w[9], w[10, 1:] = torch.arange(columns) % 16 - 8, 0.0
    return w.to(dtype)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [ordinary, extreme])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(32, 32, id="less than a panel of rows, one block"),
        pytest.param(64, 96, id="a panel, some blocks"),
        pytest.param(96, 64, id="a panel and a half"),
        pytest.param(320, 160, id="panels for several threads"),
    ],
)
def test_encoded_bytes_equal_torchs(rows, columns, values, dtype, format, isa):
    weight = values(rows, columns, dtype)
    for factor in (None, factor_of(columns)):
        if factor is not None and not extension.kernels().compensates():
            assert isa == "scalar"
            continue
        assert encode.unsupported(format.name, weight, factor) is None
        ours = encode.encode(format.name, weight, factor)
        assert torch.equal(ours, by_torch(format, weight, factor)), "searched" if factor is None else "compensated"


@formats
def test_encoded_bytes_do_not_depend_on_threads(format, set_threads, isa):
    weight = random(400, 96, scale=0.03)
    factors = [None, factor_of(96)] if extension.kernels().compensates() else [None]
    for factor in factors:
        rows = weight if factor is None else weight[:384]
        found = []
        for threads in (1, 2, 3):
            set_threads(threads)
            found.append(encode.encode(format.name, rows, factor))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_searched_rows_fill_groups_of_16(isa):
    weight = random(48, 64)
    assert torch.equal(encode.encode("q4_0", weight, None), by_torch(Q4_0(), weight, None))


def test_inputs_beyond_the_kernels_are_left_to_torch():
    factor = factor_of(64)
    for weight, given, reason in (
        (random(40, 64), None, "40 rows"),
        (random(48, 64), factor, "48 rows"),
        (random(64, 32).T, None, "not contiguous"),
        (random(32, 64).double(), None, "float64"),
        (random(32, 64), factor.T, "not contiguous"),
    ):
        assert reason in encode.unsupported("q4_0", weight, given)
    assert "q8_0" in encode.unsupported("q8_0", random(32, 64), None)
    assert search.encode(Q4_0(), random(40, 64), None).shape == (3, 32 * 18)
    assert torch.equal(search.encode(Q8_0(), random(32, 64), None), Q8_0().encode(random(32, 64))[CODES])


def test_encoded_bytes_are_the_same_without_kernels(absent, monkeypatch):
    weight, x = random(64, 96, scale=0.03).bfloat16(), random(300, 96, seed=1)
    slow = [search.encode(Q4_0(), weight, given) for given in (None, x.T @ x)]
    monkeypatch.undo()
    assert extension.available()
    fast = [search.encode(Q4_0(), weight, given) for given in (None, x.T @ x)]
    assert all(map(torch.equal, slow, fast))


@formats
@pytest.mark.parametrize("rows", [32, 40], ids=["kernels", "torch"])
def test_scales_that_fp16_cannot_hold_are_refused(rows, format):
    weight = random(rows, 64)
    weight[5, 40] = 1e7
    for inputs in (None, search.Inputs(torch.eye(64))):
        with pytest.raises(CheckpointError, match=rf"beyond 65504 times a code.*{format.name}"):
            search.encode(format, weight, inputs)
