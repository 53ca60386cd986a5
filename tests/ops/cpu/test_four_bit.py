"""4-bit numbers of a book's entries: the kernels of every instruction set compute torch's bits, both ways."""

from __future__ import annotations

import pytest
import torch

from olmoe.ops.cpu import four_bit
from olmoe.quant import FourBit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def plain(monkeypatch):
    """Calls a function without the kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(four_bit, "supported", lambda *rest: False)
            return function(*arguments)

    return call


def weight(rows, columns, dtype):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    values.view(-1)[:64] = 0  # a block without any magnitude
    values.view(-1)[64:128] = 1e-39  # and one below the smallest that has an inverse
    return values.to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (520, 512)], ids=str)  # one block; some; several tasks of threads
def test_bits_are_those_of_torch(plain, shape, name, dtype, double_quant):
    format, values = FourBit(name, double_quant), weight(*shape, dtype)
    assert four_bit.supported(values.numel(), values, dtype)
    parts, expected = format.encode(values), plain(format.encode, values)
    assert parts.keys() == expected.keys()
    for part, value in parts.items():
        assert torch.equal(value, expected[part]), part
    for wanted in DTYPES:
        assert torch.equal(format.decode(parts, *shape, wanted), plain(format.decode, parts, *shape, wanted)), wanted


def test_what_the_kernels_do_not_take():
    values = torch.zeros(2, 64)
    assert not four_bit.supported(96, values, torch.float32)  # blocks that are not whole
    assert not four_bit.supported(128, values, torch.float64)
    assert not four_bit.supported(128, torch.zeros(64, 2).T, torch.float32)
    assert not four_bit.supported(128, values.to("meta"), torch.float32)
