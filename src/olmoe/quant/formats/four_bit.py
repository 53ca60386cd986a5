"""NF4 and FP4: 4-bit codes in blocks of 64 weights, with scales that may themselves be quantized.

    w ~ code[c] * absmax      absmax: the largest magnitude of the block, in fp32
    absmax ~ dynamic[q] * nested_absmax + offset     with double quantization: 8 bits per scale, in blocks of 256

Code books, blocks, the order of nibbles and the arithmetic are those of QLoRA (arXiv 2305.14314) as
bitsandbytes stores them, so what one encodes, the other decodes to the same numbers. A weight takes 4.5 bits with
plain scales, 4.127 with double quantization. Blocks run over the flattened matrix; the last may be short.

Both ways are here in torch and in C++ (csrc/isa/common/four_bit.h), with the same bits.

Shapes legend: R rows, C columns, W = R*C weights, B = ceil(W/64) blocks.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe.errors import ConfigError
from olmoe.ops.cpu import four_bit as kernels
from olmoe.quant.formats.base import CODES, Format

BLOCK = 64
NESTED_BLOCK = 256
# Blocks decoded at a time: 2048 x 64 fp32 are 512 KB, which stay in the L2 cache.
DECODE_BLOCKS = 2048
# Keeps the reciprocal of an all-zero block's scale finite.
_TINY = 1e-38

# NF4: quantiles of the standard normal distribution scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: a sign, two exponent bits and one mantissa bit. Magnitudes by their three bits; the largest is 12.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@cache
def code_book(name: str, device: torch.device) -> Tensor:
    """The 16 values of a format by their code, fp32, within [-1, 1]."""
    if name == "nf4":
        return torch.tensor(_NF4, device=device)
    magnitudes = torch.tensor(_FP4_MAGNITUDES, device=device) / 12.0
    return torch.cat((magnitudes, -magnitudes))


@cache
def dynamic_code_book(device: torch.device) -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (arXiv 1511.04561), ascending, fp32.

    A value has a sign, a decimal exponent in unary, and a fraction in the remaining bits: 2^i fractions
    between 0.1 and 1 for the exponent i - 6.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2.0
        scaled = 10 ** (i - 6) * fractions
        values += scaled.tolist() + (-scaled).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """Both values of every byte, (256, 2): the high nibble comes first."""
    book = code_book(name, device)
    return torch.stack((book.repeat_interleave(16), book.repeat(16)), dim=1)


class FourBit(Format):
    """NF4 or FP4 (`name`), with the scales in 8 bits too if `double_quant`."""

    bits = 4
    skips_modules = True

    def __init__(self, name: str, double_quant: bool = False) -> None:
        if name not in ("nf4", "fp4"):
            raise ConfigError(f"The 4-bit type {name!r} is unknown; choose 'nf4' or 'fp4'.")
        self.name, self.double_quant = name, double_quant

    def with_packed_scales(self) -> FourBit:
        """See `Format.with_packed_scales`."""
        return FourBit(self.name, double_quant=True)

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Format.parts`."""
        weights = rows * columns
        blocks = -(-weights // BLOCK)
        codes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {CODES: (((weights + 1) // 2,), torch.uint8)}
        if not self.double_quant:
            return codes | {"absmax": ((blocks,), torch.float32)}
        return codes | {
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32),
            "offset": ((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        weight, book = weight.detach(), code_book(self.name, weight.device)
        if kernels.supported(weight.numel(), weight, weight.dtype):
            bounds, order = _ranking(book)
            codes, absmax_B = kernels.encode(weight, bounds, order)
        else:
            scaled, absmax_B = _blocks(weight.flatten().float(), BLOCK)
            numbers = _nearest(scaled, book)
            high, low = F.pad(numbers, (0, numbers.numel() % 2)).view(-1, 2).unbind(1)
            codes = high << 4 | low
        parts = {CODES: codes}
        if not self.double_quant:
            return parts | {"absmax": absmax_B}
        offset = absmax_B.mean()
        scaled, nested_absmax = _blocks(absmax_B - offset, NESTED_BLOCK)
        quantized = _nearest(scaled, dynamic_code_book(weight.device))
        return parts | {"absmax": quantized, "nested_absmax": nested_absmax, "offset": offset.reshape(1)}

    def decode(self, parts: dict[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Format.decode`."""
        codes, absmax_B = parts[CODES], self._absmax(parts)
        if kernels.supported(rows * columns, codes, dtype):
            return kernels.decode(codes, absmax_B, code_book(self.name, codes.device), dtype).view(rows, columns)
        blocks, pairs = absmax_B.numel(), _pairs(self.name, codes.device)
        codes = F.pad(codes, (0, blocks * BLOCK // 2 - codes.numel())).view(blocks, BLOCK // 2)
        out = torch.empty(blocks, BLOCK, dtype=dtype, device=codes.device)
        # In parts that stay in the cache; a GPU does not need that.
        step = DECODE_BLOCKS if codes.device.type == "cpu" else max(blocks, 1)
        for start in range(0, blocks, step):
            here = slice(start, start + step)
            values = F.embedding(codes[here].int(), pairs).view(-1, BLOCK)
            torch.mul(values, absmax_B[here].unsqueeze(1), out=values)
            out[here] = values
        return out.view(-1)[: rows * columns].view(rows, columns)

    def _absmax(self, parts: dict[str, Tensor]) -> Tensor:
        """The scale of every block, (B,) in fp32."""
        absmax_B = parts["absmax"]
        if not self.double_quant:
            return absmax_B
        dynamic = dynamic_code_book(absmax_B.device)
        nested = parts["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: absmax_B.numel()]
        return F.embedding(absmax_B.int(), dynamic.unsqueeze(1)).squeeze(1) * nested + parts["offset"]


def _blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values (n,) -> values divided by the largest magnitude of their block, (n,), and those magnitudes."""
    padded = F.pad(values, (0, -values.numel() % size)).view(-1, size)
    absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)
    return scaled.view(-1)[: values.numel()], absmax


def _nearest(values: Tensor, book: Tensor) -> Tensor:
    """The code of the entry of `book` that is nearest to each value, uint8; between two, the smaller entry."""
    bounds, order = _ranking(book)
    if len(book) == 16:
        # Fifteen vectorised comparisons are faster than a binary search.
        ranks = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        for bound in bounds:
            ranks += values > bound
    else:
        ranks = torch.bucketize(values, bounds, out_int32=True).to(torch.uint8)
    if torch.equal(order, torch.arange(len(order), device=order.device)):  # NF4 and the dynamic type, not FP4
        return ranks
    return order[ranks.int()]


def _ranking(book: Tensor) -> tuple[Tensor, Tensor]:
    """What lies halfway between neighbouring entries of `book`, ascending, and the codes of the entries, uint8."""
    ascending, order = book.sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)
