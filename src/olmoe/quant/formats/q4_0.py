"""Q4_0 of GGUF: blocks of 32 weights with codes of 4 bits, 4.5 bits per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.quant.formats.blocks import BLOCK, BlockFormat, extreme, reciprocal


class Q4_0(BlockFormat):  # noqa: N801  (GGUF's name)
    """4-bit codes: scale = the value of largest magnitude / -8, so that this value is exact."""

    name = "q4_0"
    bits = 4
    code_bytes = 16
    zero = 8

    def quantize(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockFormat.quantize`."""
        scales = extreme(blocks) / -float(self.zero)
        return self.round(blocks, scales), scales.half()

    def round(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.round`."""
        codes = blocks * reciprocal(scales.float()).unsqueeze(1)
        return codes.add_(self.zero + 0.5).clamp_(0, 2 * self.zero - 1).to(torch.uint8)  # truncates, as C does

    def values(self, code_words: Tensor) -> Tensor:
        """See `BlockFormat.values`."""
        out = torch.empty(len(code_words), BLOCK, dtype=torch.float32, device=code_words.device)
        out[:, :16] = code_words & 15
        out[:, 16:] = code_words >> 4
        return out.sub_(8.0)

    def to_bytes(self, codes: Tensor) -> Tensor:
        """See `BlockFormat.to_bytes`."""
        return codes[:, :16] | codes[:, 16:] << 4

    def flip(self, code_bytes: Tensor) -> Tensor:
        """See `BlockFormat.flip`: the bytes are the same."""
        return code_bytes
