"""Q8_0 of GGUF: blocks of 32 weights with codes of 8 bits, 8.5 bits per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.quant.formats.blocks import BlockFormat, reciprocal


class Q8_0(BlockFormat):  # noqa: N801  (GGUF's name)
    """8-bit codes: scale = largest magnitude / 127."""

    name = "q8_0"
    bits = 8
    code_bytes = 32
    zero = 128
    searched = False  # plain rounding loses a hundredth of what 4 bits lose

    def quantize(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `BlockFormat.quantize`: halves are rounded away from zero, by the fp32 scale."""
        low, high = torch.aminmax(blocks, dim=1)
        scales = torch.maximum(high, -low) / 127.0
        # Twice the value, truncated to an integer, shows exactly which side of a half it is on.
        doubled = (blocks * reciprocal(scales).unsqueeze(1)).mul_(2.0).to(torch.int16)
        codes = torch.div(doubled + doubled.sign(), 2, rounding_mode="trunc")
        return (codes + 128).to(torch.uint8), scales.half()

    def round(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """See `BlockFormat.round`."""
        return (blocks * reciprocal(scales.float()).unsqueeze(1)).round_().clamp_(-127, 127).add_(128).to(torch.uint8)

    def values(self, code_words: Tensor) -> Tensor:
        """See `BlockFormat.values`."""
        return code_words.float().sub_(128.0)

    def to_bytes(self, codes: Tensor) -> Tensor:
        """See `BlockFormat.to_bytes`."""
        return codes

    def flip(self, code_bytes: Tensor) -> Tensor:
        """See `BlockFormat.flip`: q + 128 as a byte is q with its sign bit inverted."""
        return code_bytes ^ 128
