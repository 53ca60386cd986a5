"""Weight formats: how a matrix is encoded into fewer bits, decoded again, and held by modules.

`formats` holds them, one file each, and the registry of their names; `search` chooses better codes and scales for those
of blocks. `layout` says which format each matrix of a packed checkpoint has, `saved` the same of what `save_pretrained`
stored in nf4, fp4 or int8. `modules` holds `PackedLinear`, `PackedEmbedding` and `PackedExperts`, which take the places
of the network's modules and decode what they multiply with, matrix by matrix.
"""

from __future__ import annotations

from olmoe.quant.formats import (
    FORMATS,
    Q4_0,
    Q5_0,
    Q8_0,
    BlockFormat,
    Format,
    FourBit,
    Int8,
    layout_formats,
    make_block_format,
    make_format,
    register_format,
    saved_formats,
)
from olmoe.quant.layout import PackedLayout
from olmoe.quant.modules import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from olmoe.quant.saved import SavedLayout

__all__ = [
    "FORMATS",
    "Q4_0",
    "Q5_0",
    "Q8_0",
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
    "layout_formats",
    "make_block_format",
    "make_format",
    "register_format",
    "saved_formats",
]
