"""4-bit code-book formats: every instruction set encodes and decodes the same bits as torch."""

from __future__ import annotations

import math

import pytest
import torch

from olmoe.ops.cpu import four_bit
from olmoe.quant import FourBit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def plain(monkeypatch):
    """Call a function without the kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(four_bit, "supported", lambda *rest: False)
            return function(*arguments)

    return call


def weight(rows, columns, dtype):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    values.view(-1)[:64] = 0  # a block of zeros
    values.view(-1)[64:128] = 1e-39  # and one below the smallest that has an inverse
    return values.to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (520, 512)], ids=str)  # one block; a few; several tasks
def test_results_equal_torchs_bit_for_bit(plain, shape, name, dtype, double_quant):
    format, values = FourBit(name, double_quant), weight(*shape, dtype)
    assert four_bit.supported(values.numel(), values, dtype)
    parts, expected = format.encode(values), plain(format.encode, values)
    assert parts.keys() == expected.keys()
    for part, value in parts.items():
        assert torch.equal(value, expected[part]), part
    for wanted in DTYPES:
        assert torch.equal(format.decode(parts, *shape, wanted), plain(format.decode, parts, *shape, wanted)), wanted


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", [0, 5, 63])
def test_a_nonfinite_value_makes_its_block_nan(plain, place, value, dtype):
    """A NaN anywhere makes its whole block NaN; it must not turn into an ordinary weight."""
    format, values = FourBit("nf4"), weight(4, 64, dtype)
    values[2, place] = value
    parts, expected = format.encode(values), plain(format.encode, values)
    assert torch.equal(parts["codes"], expected["codes"])
    assert torch.equal(parts["absmax"].isnan(), expected["absmax"].isnan())
    assert parts["absmax"][2].isnan() == math.isnan(value)
    decoded, by_torch = (f(format.decode, parts, 4, 64, dtype) for f in (lambda d, *a: d(*a), plain))
    assert torch.equal(decoded[2].isfinite(), by_torch[2].isfinite())
    assert not decoded[2].isfinite().any()
    assert decoded[[0, 1, 3]].isfinite().all()


def test_unsupported_inputs_are_left_to_torch():
    values = torch.zeros(2, 64)
    assert not four_bit.supported(96, values, torch.float32)  # incomplete blocks
    assert not four_bit.supported(128, values, torch.float64)
    assert not four_bit.supported(128, torch.zeros(64, 2).T, torch.float32)
    assert not four_bit.supported(128, values.to("meta"), torch.float32)
