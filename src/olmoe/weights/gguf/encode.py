"""Weights to the bytes of GGUF's block types, rounded as by llama.cpp's reference quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.errors import CheckpointError, shown
from olmoe.quant.formats import BlockFormat, layout_formats, make_format
from olmoe.quant.formats.blocks import BLOCK
from olmoe.weights.gguf.block_types import BY_NAME, BlockType, Bytes

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Our formats that GGUF has too, by its names for them.
_FORMATS = {name.upper(): make_format(name) for name in layout_formats() if name.upper() in BY_NAME}
BLOCKS = {name: format for name, format in _FORMATS.items() if isinstance(format, BlockFormat)}
ENCODABLE = (*_PLAIN, *BLOCKS)
# Weights encoded at a time: 1 M in fp32 are 4 MB.
PART_WEIGHTS = 2**20


def fitting(kind: BlockType, columns: int) -> BlockType:
    """`kind`, or BF16 if rows of `columns` values are not whole blocks of it."""
    return BY_NAME["BF16"] if columns % kind.block_values else kind


def encode(name: str, weight: Tensor, kind: BlockType) -> Bytes:
    """weight (..., C) of the tensor `name`, in any floating dtype -> (..., bytes of a row).

    Raises `CheckpointError` for values that the type cannot hold: infinite or not a number, or beyond fp16.
    """
    out = torch.empty(*weight.shape[:-1], kind.row_bytes(weight.shape[-1]), dtype=torch.uint8)
    rows, encoded = weight.reshape(-1, weight.shape[-1]), out.view(-1, out.shape[-1])
    step = max(PART_WEIGHTS // weight.shape[-1], 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step].detach()
        encoded[start : start + step] = _encode_rows(name, part, kind)
    array: Bytes = out.numpy()
    return array


def _encode_rows(name: str, rows: Tensor, kind: BlockType) -> Tensor:
    """rows (R, C) -> (R, bytes of a row) uint8."""
    if kind.name in _PLAIN:
        plain = rows.to(_PLAIN[kind.name]).contiguous()
        if not all_finite(plain):
            raise CheckpointError(_refusal(name, kind))
        return plain.view(torch.uint8)
    format = BLOCKS[kind.name]
    codes, scales = format.quantize(rows.float().reshape(-1, BLOCK))
    if kind.name == "Q8_0":
        scales = scales.abs()  # blocks of zeros have the scale 0 there, never -0
    if not all_finite(scales):
        raise CheckpointError(_refusal(name, kind))
    scale_bytes = scales.unsqueeze(-1).view(torch.uint8)
    return torch.cat((scale_bytes, format.flip(format.to_bytes(codes))), dim=-1).view(len(rows), -1)


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite, computed without a mask of their size."""
    low, high = torch.aminmax(values)  # NaN propagates
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _refusal(name: str, kind: BlockType) -> str:
    return (
        f"Tensor {shown(name)} has values that are not finite or too large for {kind.name}; check the checkpoint, or "
        "choose the type bf16 if they are only large."
    )
