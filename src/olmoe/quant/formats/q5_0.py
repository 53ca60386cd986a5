"""Q5_0 of GGUF: blocks of 32 weights with codes of 5 bits, 5.5 bits per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.quant.formats.blocks import GROUP
from olmoe.quant.formats.q4_0 import Q4_0


class Q5_0(Q4_0):  # noqa: N801  (GGUF's name)
    """5-bit codes: scale = the value of largest magnitude / -16. Bytes: fifth bits of all columns, then as Q4_0."""

    name = "q5_0"
    bits = 5
    code_bytes = 20
    zero = 16

    def values(self, code_words: Tensor) -> Tensor:
        """See `BlockFormat.values`."""
        shifts = torch.arange(8, dtype=torch.uint8, device=code_words.device)
        fifth = (code_words[:, :4].unsqueeze(-1) >> shifts & 1).flatten(1)
        return super().values(code_words[:, 4:]).add_(fifth << 4).sub_(8.0)

    def to_bytes(self, codes: Tensor) -> Tensor:
        """See `BlockFormat.to_bytes`."""
        shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
        fifth = (codes.view(-1, 4, 8) >> 4 << shifts).sum(-1, dtype=torch.uint8)
        return torch.cat((fifth, super().to_bytes(codes & 15)), dim=1)

    def interleave(self, code_bytes: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.interleave`."""
        out = super().interleave(code_bytes, scales)
        self._fifth_bits(out).copy_(_transpose_nibbles(self._fifth_bits(out).unflatten(-1, (GROUP, 4))).flatten(-2))
        return out

    def deinterleave(self, packed: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """See `BlockFormat.deinterleave`."""
        rows = packed.clone()
        self._fifth_bits(rows).copy_(_transpose_nibbles(self._fifth_bits(packed).unflatten(-1, (8, 8))).flatten(-2))
        return super().deinterleave(rows, columns)

    def shared_bits(self, code_bytes: Tensor, packed: Tensor, group: Tensor, row: Tensor) -> Tensor:
        """See `BlockFormat.shared_bits`: two rows share each byte of the words of fifth bits."""
        pairs = self._fifth_bits(packed).unflatten(-1, (8, 8))[group, :, :, row // 2]
        nibbles = pairs >> (row % 2 * 4).to(torch.uint8).view(-1, 1, 1) & 15  # (N, B, 8)
        return torch.cat((nibbles[..., 0::2] | nibbles[..., 1::2] << 4, code_bytes[..., 4:]), dim=-1)

    def _fifth_bits(self, packed: Tensor) -> Tensor:
        """The fifth bits of all blocks of groups, a view (G, B, 64) uint8."""
        ends = packed.shape[1] // self.block_bytes * self.code_bytes
        return packed[:, :ends].unflatten(1, (-1, self.code_bytes * GROUP))[:, :, : 4 * GROUP]


def _transpose_nibbles(x: Tensor) -> Tensor:
    """Matrices (..., R, C/2) uint8 of half bytes, the lower first -> (..., C, R/2)."""
    nibbles = torch.stack((x & 15, x >> 4), dim=-1).flatten(-2).transpose(-1, -2)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
