"""FP4: 4-bit codes with a sign, two exponent bits and one mantissa bit."""

from __future__ import annotations

from olmoe.quant.formats.four_bit import FourBit


class FP4(FourBit):
    """`FourBit` with FP4's code book."""

    name = "fp4"

    def __init__(self, double_quant: bool = False) -> None:
        super().__init__(self.name, double_quant)
