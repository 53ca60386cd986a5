"""Weight formats: how a matrix is encoded into fewer bits, decoded again, and held by modules.

`formats` defines a format, `four_bit` (NF4, FP4) and `eight_bit` (int8 by rows) implement it in plain torch,
and `modules` holds `PackedLinear` and `PackedExperts`, which take the places of the network's `Linear` and
`Experts` and decode what they multiply with, matrix by matrix.
"""

from __future__ import annotations

from olmoe.quant.eight_bit import Int8
from olmoe.quant.formats import Format
from olmoe.quant.four_bit import FourBit
from olmoe.quant.modules import PackedExperts, PackedLinear, PackedModule

FORMATS = ("nf4", "fp4", "int8")

__all__ = ["FORMATS", "Format", "FourBit", "Int8", "PackedExperts", "PackedLinear", "PackedModule", "make_format"]


def make_format(name: str, double_quant: bool = False) -> Format:
    """The format of that name, one of `FORMATS`; `double_quant` also packs the scales of the 4-bit ones."""
    return Int8() if name == "int8" else FourBit(name, double_quant)
