"""NF4: 4-bit codes for the quantiles of the standard normal distribution (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from olmoe.quant.formats.four_bit import FourBit


class NF4(FourBit):
    """`FourBit` with NF4's code book."""

    name = "nf4"

    def __init__(self, double_quant: bool = False) -> None:
        super().__init__(self.name, double_quant)
