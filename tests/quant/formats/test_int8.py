"""Int8 by rows: error bound, zero rows, rounding, and interchange with bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from olmoe.quant import Int8
from olmoe.quant.formats.int8 import DECODE_WEIGHTS


def random_weight(rows, columns, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (DECODE_WEIGHTS // 64 + 3, 64)], ids=str)
def test_errors_stay_within_half_a_step_of_the_row(shape):
    weight = random_weight(*shape)
    parts = Int8().encode(weight)
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == Int8().parts(*shape)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    decoded = Int8().decode(parts, *shape, torch.float32)
    assert ((decoded - weight).abs() / step).max() <= 0.5 + 1e-4
    assert torch.equal(Int8().decode(parts, *shape, torch.bfloat16), decoded.bfloat16())


def test_a_large_row_does_not_coarsen_the_others():
    weight = random_weight(4, 16)
    weight[0] *= 1000
    decoded = Int8().decode(Int8().encode(weight), 4, 16, torch.float32)
    assert (decoded[1:] - weight[1:]).abs().max() < 1e-3


def test_zero_rows_stay_zero():
    weight = random_weight(3, 16)
    weight[1] = 0
    assert torch.equal(Int8().decode(Int8().encode(weight), 3, 16, torch.float32)[1], torch.zeros(16))


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(64, 128, torch.float16)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    parts = Int8().encode(weight)
    assert torch.equal(parts["codes"], codes)
    assert torch.equal(parts["absmax"], absmax)
    theirs = functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.allclose(Int8().decode(parts, 64, 128, torch.float32), theirs, rtol=1e-6, atol=0)
