"""Q8_0, Q5_0 and Q4_0: blocks of 32 columns of a row that share one fp16 scale, stored as the CPU kernels read them.

    q8_0    w ~ q * scale          q in -128..127
    q5_0    w ~ (q - 16) * scale   q in 0..31
    q4_0    w ~ (q - 8) * scale    q in 0..15

Values are interchangeable, bit for bit, with the GGUF types of the same names (block layouts and the arithmetic of
the reference quantizers: ggml-quants.c of llama.cpp); only their order in memory differs. GGUF stores a row block by
block, the scale first. Here 16 rows form a group, so that a vector register holds the same columns of several rows:

    group g of a matrix:  codes of block 0, of block 1, ..., then the scales, block-major, as little-endian fp16
    q4_0, 256 bytes a block: byte j*64 + 4*r + i (j < 4, r < 16, i < 4) holds of row r column 4j+i in its low nibble
        and column 16+4j+i in its high one
    q5_0, 320 bytes a block: 8 words of 64 bits, of which bit 4*r+i of word j is the fifth bit of row r and column 4j+i,
        then 256 bytes with the low four bits as in q4_0
    q8_0, 512 bytes a block: byte j*64 + 4*r + i (j < 8) holds of row r column 4j+i as q + 128

A last group of fewer rows is filled with zero codes and zero scales. The formats take 8.5, 5.5 and 4.5 bits per weight.

Shapes legend: R rows, C columns, B = C/32 blocks of a row, G = ceil(R/16) groups.
"""

from __future__ import annotations

import sys
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe.errors import CheckpointError, ConfigError
from olmoe.quant.formats.base import CODES, Format

BLOCK = 32
GROUP = 16
SCALE_BYTES = 2
# Weights encoded or decoded at a time: 128 k in fp32 are 512 KB, which stay in the L2 cache.
PART_WEIGHTS = 2**17
# Above it a scale is not finite in fp16.
MAX_SCALE = 65504.0


def packable(rows: int, columns: int) -> bool:
    """Whether a matrix of this shape can be stored in blocks."""
    return rows > 0 and columns > 0 and columns % BLOCK == 0


class BlockFormat(Format):
    """What Q8_0, Q5_0 and Q4_0 share: the interleaved layout, and conversion to and from GGUF's rows of blocks."""

    code_bytes: int  # per block of a row
    zero: int  # the code of the value 0
    searched = True  # whether searching for codes improves it (`olmoe.quant.search`)

    def __init__(self) -> None:
        assert sys.byteorder == "little", "scales and interleaved words are little-endian"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one row, codes and scale; also GGUF's type size."""
        return self.code_bytes + SCALE_BYTES

    def fits(self, rows: int, columns: int) -> bool:
        """See `Format.fits`."""
        return packable(rows, columns)

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Format.parts`. Raises `ConfigError` for columns that are not a multiple of 32."""
        if not packable(rows, columns):
            raise ConfigError(
                f"A matrix of {rows}x{columns} cannot be stored as {self.name}, whose blocks hold 32 columns; keep it "
                "in bf16."
            )
        return {CODES: ((-(-rows // GROUP), columns // BLOCK * GROUP * self.block_bytes), torch.uint8)}

    # ---- numbers ----

    @abstractmethod
    def quantize(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks (N, 32) fp32 -> codes (N, 32) uint8 as stored, and scales (N,) fp16; GGUF's reference rounding."""

    @abstractmethod
    def round(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """The nearest codes (N, 32) uint8 of blocks (N, 32) fp32 for scales (N,) fp16 or fp32, of either sign."""

    @abstractmethod
    def values(self, code_words: Tensor) -> Tensor:
        """Bytes of codes in GGUF's order of columns (N, code_bytes) uint8 -> fp32 (N, 32), before the scale."""

    @abstractmethod
    def to_bytes(self, codes: Tensor) -> Tensor:
        """Codes (N, 32) uint8 -> bytes in GGUF's order of columns (N, code_bytes) uint8."""

    @abstractmethod
    def flip(self, code_bytes: Tensor) -> Tensor:
        """Stored bytes of codes to GGUF's, or back."""

    # ---- layout ----

    def interleave(self, code_bytes: Tensor, scales: Tensor) -> Tensor:
        """Bytes of codes (R, B, code_bytes) in the order of columns and scales (R, B) fp16 -> (G, bytes) uint8."""
        rows, blocks, _ = code_bytes.shape
        groups, words = -(-rows // GROUP), self.code_bytes // 4
        missing = groups * GROUP - rows
        if missing:
            code_bytes, scales = F.pad(code_bytes, (0, 0, 0, 0, 0, missing)), F.pad(scales, (0, 0, 0, missing))
        out = torch.empty(groups, blocks * GROUP * self.block_bytes, dtype=torch.uint8, device=code_bytes.device)
        ends = blocks * GROUP * self.code_bytes
        grouped = code_bytes.contiguous().view(torch.int32).view(groups, GROUP, blocks, words)
        out[:, :ends].view(torch.int32).view(groups, blocks, words, GROUP).copy_(grouped.permute(0, 2, 3, 1))
        scale_words = scales.contiguous().view(torch.int16).view(groups, GROUP, blocks)
        out[:, ends:].view(torch.int16).view(groups, blocks, GROUP).copy_(scale_words.permute(0, 2, 1))
        return out

    def deinterleave(self, packed: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """The inverse of `interleave`, with the rows that fill the last group: (16G, B, code_bytes), (16G, B)."""
        groups, blocks, words = packed.shape[0], columns // BLOCK, self.code_bytes // 4
        ends = blocks * GROUP * self.code_bytes
        code_words = packed[:, :ends].view(torch.int32).view(groups, blocks, words, GROUP).permute(0, 3, 1, 2)
        scale_words = packed[:, ends:].view(torch.int16).view(groups, blocks, GROUP).permute(0, 2, 1)
        code_bytes = code_words.contiguous().view(torch.uint8).view(groups * GROUP, blocks, self.code_bytes)
        return code_bytes, scale_words.contiguous().view(torch.float16).view(groups * GROUP, blocks)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`. Raises `CheckpointError` for weights that are not finite or too large for fp16."""
        (shape, dtype) = self.parts(*weight.shape)[CODES]
        rows, columns = weight.shape
        out = torch.empty(shape, dtype=dtype, device=weight.device)
        step = max(PART_WEIGHTS // columns // GROUP, 1) * GROUP
        for start in range(0, rows, step):
            wide = weight[start : start + step].detach().float()
            codes, scales = self.quantize(wide.reshape(-1, BLOCK))
            out[start // GROUP : (start + step) // GROUP] = self.pack(codes, scales, len(wide))
        return {CODES: out}

    def pack(self, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
        """Codes (R*B, 32) uint8 and scales (R*B,) fp16, row by row -> the stored matrix (G, bytes) uint8."""
        self.check_scales(scales)
        code_bytes = self.to_bytes(codes).view(rows, -1, self.code_bytes)
        return self.interleave(code_bytes, scales.view(rows, -1))

    def check_scales(self, scales: Tensor) -> None:
        """Raise `CheckpointError` for scales that are not finite."""
        if not torch.isfinite(scales).all():
            raise CheckpointError(
                f"The weights hold values that are not finite or beyond {MAX_SCALE:.0f} times a code, so they cannot "
                f"be stored as {self.name}; check the checkpoint, or keep this matrix in bf16."
            )

    def scales_of(self, packed: Tensor) -> Tensor:
        """The scales of a stored matrix (G, bytes), a view (G, 16 * B) fp16."""
        ends = packed.shape[1] // self.block_bytes * self.code_bytes
        return packed[:, ends:].view(torch.float16)

    def decode(self, parts: dict[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Format.decode`."""
        packed = parts[CODES]
        out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
        step = max(PART_WEIGHTS // columns // GROUP, 1) if packed.device.type == "cpu" else max(packed.shape[0], 1)
        for start in range(0, packed.shape[0], step):
            code_bytes, scales = self.deinterleave(packed[start : start + step], columns)
            here = out[start * GROUP : (start + step) * GROUP]
            values = self.values(code_bytes.view(-1, self.code_bytes)).mul_(scales.view(-1, 1).float())
            here.copy_(values.view(-1, columns)[: len(here)])
        return out

    def decode_rows(self, parts: dict[str, Tensor], row_ids: Tensor, rows: int, columns: int) -> Tensor:
        """See `Format.decode_rows`; only the chosen rows are read."""
        packed, blocks, words = parts[CODES], columns // BLOCK, self.code_bytes // 4
        group, row = row_ids // GROUP, row_ids % GROUP
        ends = blocks * GROUP * self.code_bytes
        code_words = packed[:, :ends].view(torch.int32).view(-1, blocks, words, GROUP)[group, :, :, row]
        code_bytes = code_words.contiguous().view(torch.uint8)  # (N, B, code_bytes)
        scales = packed[:, ends:].view(torch.int16).view(-1, blocks, GROUP)[group, :, row].view(torch.float16)  # (N, B)
        values = self.values(self.shared_bits(code_bytes, packed, group, row).view(-1, self.code_bytes))
        return values.mul_(scales.reshape(-1, 1).float()).view(len(row_ids), columns)

    def shared_bits(self, code_bytes: Tensor, packed: Tensor, group: Tensor, row: Tensor) -> Tensor:
        """Bytes of codes (N, B, code_bytes) with the bits that rows share filled in, for rows `row` (N) of `group`."""
        return code_bytes

    # ---- GGUF ----

    def from_gguf(self, rows_of_blocks: Tensor) -> Tensor:
        """A matrix in GGUF's bytes, (R, B * block_bytes) uint8, to the stored layout, (G, bytes) uint8."""
        rows = rows_of_blocks.shape[0]
        blocks = rows_of_blocks.reshape(rows, -1, self.block_bytes)
        scales = blocks[:, :, :SCALE_BYTES].contiguous().view(torch.float16).squeeze(-1)
        return self.interleave(self.flip(blocks[:, :, SCALE_BYTES:]), scales)

    def to_gguf(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse of `from_gguf`: (R, B * block_bytes) uint8."""
        code_bytes, scales = self.deinterleave(packed, columns)
        scale_bytes = scales.unsqueeze(-1).view(torch.uint8)  # (16G, B, 2)
        return torch.cat((scale_bytes, self.flip(code_bytes)), dim=-1).flatten(1)[:rows]


def extreme(blocks: Tensor) -> Tensor:
    """The value of largest magnitude in each block, the first of equal ones. (N, 32) -> (N,)."""
    low, high = torch.aminmax(blocks, dim=1)
    values = torch.where(high > -low, high, low)
    tied = (high == -low) & (high > 0)
    if tied.any():
        some = blocks[tied]
        values[tied] = some.gather(1, some.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return values


def reciprocal(scales: Tensor) -> Tensor:
    """1/scale, or 0 if that is not finite (blocks of zeros)."""
    inverse = scales.reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, 0.0)
