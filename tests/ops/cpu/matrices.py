"""Random tensors and packed matrices for the kernels' tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmoe.quant import BlockFormat, make_block_format
from olmoe.quant.formats import CODES

FORMATS = ("q4_0", "q5_0", "q8_0")


class Packed(NamedTuple):
    """A packed matrix (R, C), or a stack (E, R, C): its bytes, its format, and the fp32 values that it decodes to."""

    codes: Tensor
    format: str
    values: Tensor


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(format: str, weight: Tensor) -> Packed:
    """A matrix, or a stack of them, rounded to a format."""
    return _decoded(
        make_block_format(format),
        [make_block_format(format).encode(w)[CODES] for w in weight.view(-1, *weight.shape[-2:])],
        weight,
    )


def from_codes(format: str, codes: Tensor, scales: Tensor) -> Packed:
    """Codes (R, C) as stored, and scales (R, C/32)."""
    block_format = make_block_format(format)
    packed = block_format.pack(codes.to(torch.uint8).view(-1, 32), scales.half().flatten(), len(codes))
    return _decoded(block_format, [packed], codes)


def _decoded(format: BlockFormat, packed: list[Tensor], like: Tensor) -> Packed:
    rows, columns = like.shape[-2:]
    values = torch.stack([format.decode({CODES: p}, rows, columns, torch.float32) for p in packed]).view(like.shape)
    codes = torch.stack(packed)
    return Packed(codes if like.dim() == 3 else codes[0], format.name, values)


def error(ours: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest magnitude."""
    assert ours.shape == expected.shape, (ours.shape, expected.shape)
    assert ours.dtype == expected.dtype
    assert torch.isfinite(ours).all()
    scale = expected.float().abs().max().clamp(min=1e-30) if expected.numel() else torch.tensor(1.0)
    return float((ours.float() - expected.float()).abs().max() / scale) if expected.numel() else 0.0
