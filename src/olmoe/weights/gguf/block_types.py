"""How GGUF stores numbers: block layouts and dequantization.

A row is divided into blocks of 32 or 256 adjacent columns. Each block holds its scales and small integers in a
fixed number of bytes, little endian. The layouts are ggml's (`ggml-common.h`), verified in
`tests/weights/gguf/test_block_types.py` against the `gguf` package and in `test_to_gguf_llama_cpp.py` against
llama.cpp itself.

Arithmetic is fp32 in the order of ggml's reference code, so values agree bit for bit.
Shapes legend: n blocks; every decoder takes (n, bytes per block) uint8 and returns (n, values per block) fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Values decoded at a time: few enough for intermediate results to stay in the cache.
PART_VALUES = 2**18


@dataclass(frozen=True)
class BlockType:
    """One of ggml's tensor types: its number in the file, values and bytes per block, and how to decode it."""

    code: int
    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values, which must be a multiple of `block_values`."""
        return columns // self.block_values * self.block_bytes


def dequantize(kind: BlockType, data: Bytes) -> Floats:
    """data (..., bytes of a row) uint8 -> (..., columns) fp32."""
    blocks = np.ascontiguousarray(data).reshape(-1, kind.block_bytes)
    columns = data.shape[-1] // kind.block_bytes * kind.block_values
    out = np.empty((len(blocks), kind.block_values), np.float32)
    step = max(PART_VALUES // kind.block_values, 1)
    with np.errstate(invalid="ignore", over="ignore"):  # a hostile file may hold infinite scales
        for start in range(0, len(blocks), step):
            out[start : start + step] = kind.decode(blocks[start : start + step])
    return out.reshape(*data.shape[:-1], columns)


# ---- decoders ----


def _half(blocks: Bytes, start: int) -> Floats:
    """The fp16 number at byte `start` of each block -> (n, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(n, b) -> (n, 2b): the low halves of all bytes, then the high ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def _bits(blocks: Bytes, start: int, stop: int) -> Bytes:
    """The bits of bytes `start` to `stop` of each block, least significant first."""
    return np.unpackbits(blocks[:, start:stop], axis=1, bitorder="little")


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | (_bits(blocks, 2, 6) << 4)
    return _half(blocks, 0) * (codes.astype(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | (_bits(blocks, 4, 8) << 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _pairs(packed: Bytes, parts: int) -> Bytes:
    """(n, parts * b) -> (n, parts, 4, b): the four 2-bit fields of each byte, field-major within a part."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    return (packed.reshape(len(packed), parts, 1, -1) >> shifts) & np.uint8(3)


def _q2_k(blocks: Bytes) -> Floats:
    n, scales = len(blocks), blocks[:, :16]
    codes = _pairs(blocks[:, 16:80], 2).reshape(n, 16, 16).astype(np.float32)
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)  # (n, 16)
    offset = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return (scale[..., None] * codes - offset[..., None]).reshape(n, 256)


def _q3_k(blocks: Bytes) -> Floats:
    n, packed = len(blocks), blocks[:, 96:108]
    # The high bit of the value in part p, field f is bit 4p + f of the 32 mask bytes; unset means minus 4.
    masks = np.unpackbits(blocks[:, None, :32], axis=1, bitorder="little")  # (n, 8, 32)
    codes = _pairs(blocks[:, 32:96], 2).reshape(n, 8, 32).astype(np.int8) - ((1 - masks) * 4).astype(np.int8)
    high = _pairs(packed[:, 8:], 1).reshape(n, 16)
    scales = (_nibbles(packed[:, :8]) | (high << 4)).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 108) * scales.astype(np.float32)  # (n, 16)
    return (scale[..., None] * codes.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


def _scales_and_offsets(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight 6-bit scales and offsets that Q4_K and Q5_K pack into 12 bytes -> two (n, 8)."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)
    offsets = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    return scales, offsets


def _affine_256(blocks: Bytes, codes: Bytes) -> Floats:
    """Q4_K and Q5_K: eight groups of 32 codes (n, 8, 32), each with a scale and an offset."""
    scales, offsets = _scales_and_offsets(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    offset = _half(blocks, 2) * offsets.astype(np.float32)
    return (scale[..., None] * codes.astype(np.float32) - offset[..., None]).reshape(len(blocks), 256)


def _halves(packed: Bytes) -> Bytes:
    """(n, 128) -> (n, 8, 32): every 32 bytes hold one group in their low halves and the next in their high halves."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate((groups & 15, groups >> 4), axis=2).reshape(len(packed), 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _affine_256(blocks, _halves(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    fifth = np.unpackbits(blocks[:, None, 16:48], axis=1, bitorder="little")  # bit g of a byte: group g, (n, 8, 32)
    return _affine_256(blocks, _halves(blocks[:, 48:]) | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 1, 64)
    low = np.concatenate((low & 15, low >> 4), axis=2).reshape(n, 2, 4, 32)
    codes = (low | (_pairs(blocks[:, 128:192], 2) << 4)).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)  # (n, 16)
    return (scale[..., None] * codes.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


# The 16 values that codes of IQ4_NL and IQ4_XS stand for (ggml's `kvalues_iq4nl`).
_NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _NONLINEAR[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Bytes) -> Floats:
    n = len(blocks)
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(n, 8)
    high = _pairs(blocks[:, 2:4], 2).reshape(n, 8)
    scale = _half(blocks, 0) * ((low | (high << 4)).astype(np.int8) - np.int8(32)).astype(np.float32)
    codes = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(n, 8, 32)
    return (scale[..., None] * _NONLINEAR[codes]).reshape(n, 256)


TYPES: dict[int, BlockType] = {
    kind.code: kind
    for kind in (
        BlockType(0, "F32", 1, 4, _f32),
        BlockType(1, "F16", 1, 2, _f16),
        BlockType(2, "Q4_0", 32, 18, _q4_0),
        BlockType(3, "Q4_1", 32, 20, _q4_1),
        BlockType(6, "Q5_0", 32, 22, _q5_0),
        BlockType(7, "Q5_1", 32, 24, _q5_1),
        BlockType(8, "Q8_0", 32, 34, _q8_0),
        BlockType(10, "Q2_K", 256, 84, _q2_k),
        BlockType(11, "Q3_K", 256, 110, _q3_k),
        BlockType(12, "Q4_K", 256, 144, _q4_k),
        BlockType(13, "Q5_K", 256, 176, _q5_k),
        BlockType(14, "Q6_K", 256, 210, _q6_k),
        BlockType(20, "IQ4_NL", 32, 18, _iq4_nl),
        BlockType(23, "IQ4_XS", 256, 136, _iq4_xs),
        BlockType(30, "BF16", 1, 2, _bf16),
    )
}
BY_NAME: dict[str, BlockType] = {kind.name: kind for kind in TYPES.values()}

# Types of ggml that are not read here, so that a refusal can name them.
OTHER_TYPES: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
