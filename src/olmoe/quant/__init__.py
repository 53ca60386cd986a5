"""Weight formats: how a matrix is encoded into fewer bits, decoded again, and held by modules.

`formats` defines a format. `four_bit` (NF4, FP4), `eight_bit` (int8 by rows) and `blocks` (Q8_0, Q5_0 and Q4_0, in
the layout of the CPU kernels) implement it in plain torch, and `search` chooses better codes and scales for `blocks`.
`layout` says which format each matrix of a packed checkpoint has, `saved` the same of what `save_pretrained` stored in
nf4, fp4 or int8. `modules` holds `PackedLinear`, `PackedEmbedding` and
`PackedExperts`, which take the places of the network's modules and decode what they multiply with, matrix by matrix.
"""

from __future__ import annotations

from olmoe.quant.blocks import Q4_0, Q5_0, Q8_0, BlockFormat
from olmoe.quant.eight_bit import Int8
from olmoe.quant.formats import Format
from olmoe.quant.four_bit import FourBit
from olmoe.quant.layout import BLOCK_FORMATS, PackedLayout, make_block_format
from olmoe.quant.modules import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from olmoe.quant.saved import SAVED_FORMATS, SavedLayout

FORMATS = (*SAVED_FORMATS, *BLOCK_FORMATS)

__all__ = [
    "BLOCK_FORMATS",
    "FORMATS",
    "Q4_0",
    "Q5_0",
    "Q8_0",
    "SAVED_FORMATS",
    "BlockFormat",
    "Format",
    "FourBit",
    "Int8",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLayout",
    "PackedLinear",
    "PackedModule",
    "SavedLayout",
    "make_block_format",
    "make_format",
]


def make_format(name: str, double_quant: bool = False) -> Format:
    """The format of that name, one of `FORMATS`; `double_quant` also packs the scales of NF4 and FP4."""
    if name in BLOCK_FORMATS:
        return make_block_format(name)
    return Int8() if name == "int8" else FourBit(name, double_quant)
