"""The C++ kernels of the 4-bit code-book formats: the arithmetic of `olmoe.quant.formats.four_bit`, bit for bit.

Shapes legend: B blocks of 64 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.ops.cpu.extension import FLOAT_TYPES, kernels, unsupported

BLOCK, ENTRIES = 64, 16


def supported(weights: int, values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take `values`: weights of `dtype`, or the codes of that many."""
    whole = weights > 0 and weights % BLOCK == 0 and dtype in FLOAT_TYPES
    return whole and values.is_contiguous() and unsupported(values) is None


def decode(codes: Tensor, absmax_B: Tensor, book: Tensor, dtype: torch.dtype) -> Tensor:
    """The (B, 64) values, in `dtype`, of codes (B * 32) uint8 and scales (B) fp32; `book` has 16 entries."""
    blocks = absmax_B.numel()
    assert codes.dtype == torch.uint8
    assert codes.is_cpu
    assert codes.is_contiguous()
    assert codes.numel() == blocks * BLOCK // 2, (codes.shape, blocks)
    assert absmax_B.dtype == book.dtype == torch.float32
    assert book.shape == (ENTRIES,)
    scales, book = absmax_B.contiguous(), book.contiguous()
    out = torch.empty(blocks, BLOCK, dtype=dtype)
    kernels().decode_book(
        codes.data_ptr(), scales.data_ptr(), blocks, book.data_ptr(), FLOAT_TYPES[dtype], out.data_ptr()
    )
    return out


def encode(weight: Tensor, bounds: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (B * 32) uint8 and scales (B) fp32 of a matrix.

    A weight's code is in `numbers` (16) by how many of the rising `bounds` (15) it exceeds, divided by its scale.
    """
    assert weight.numel() % BLOCK == 0
    assert weight.is_contiguous()
    assert bounds.shape == (ENTRIES - 1,)
    assert numbers.shape == (ENTRIES,)
    assert numbers.dtype == torch.uint8
    assert bounds.dtype == torch.float32
    bounds, numbers = bounds.contiguous(), numbers.contiguous()
    blocks = weight.numel() // BLOCK
    codes, absmax_B = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8), torch.empty(blocks)
    kernels().encode_book(
        weight.data_ptr(),
        FLOAT_TYPES[weight.dtype],
        blocks,
        bounds.data_ptr(),
        numbers.data_ptr(),
        codes.data_ptr(),
        absmax_B.data_ptr(),
    )
    return codes, absmax_B
