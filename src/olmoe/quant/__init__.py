"""Weight formats: how a matrix is encoded into fewer bits, decoded again, and held by modules.

`formats` holds them, one file each, and the registry of their names; `search` chooses better codes and scales for block
formats. `layout` says which format each matrix of a packed checkpoint has. `modules` holds `PackedLinear`,
`PackedEmbedding` and `PackedExperts`, which decode what they multiply with, matrix by matrix; `swap` replaces
the network's modules with them.
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
from olmoe.quant.layout import Layout, PackedLayout, SavedLayout
from olmoe.quant.modules import PackedEmbedding, PackedExperts, PackedLinear, PackedModule

__all__ = [
    "FORMATS",
    "Q4_0",
    "Q5_0",
    "Q8_0",
    "BlockFormat",
    "Format",
    "FourBit",
    "Int8",
    "Layout",
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
