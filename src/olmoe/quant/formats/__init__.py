"""Weight formats, one file each, and the registry of their names.

`base` defines a format, `registry` lists those that exist. `q8_0`, `q5_0` and `q4_0` share `blocks`, the layout of the
CPU kernels; `nf4` and `fp4` share `four_bit`; `int8` has a scale for each row. All are plain torch.
"""

from __future__ import annotations

from olmoe.quant.formats.base import CODES, Format
from olmoe.quant.formats.blocks import BlockFormat
from olmoe.quant.formats.four_bit import FourBit
from olmoe.quant.formats.fp4 import FP4
from olmoe.quant.formats.int8 import Int8
from olmoe.quant.formats.nf4 import NF4
from olmoe.quant.formats.q4_0 import Q4_0
from olmoe.quant.formats.q5_0 import Q5_0
from olmoe.quant.formats.q8_0 import Q8_0
from olmoe.quant.formats.registry import (
    FORMATS,
    PLAIN,
    layout_formats,
    make_format,
    register_format,
    saved_formats,
)

__all__ = [
    "CODES",
    "FORMATS",
    "FP4",
    "NF4",
    "PLAIN",
    "Q4_0",
    "Q5_0",
    "Q8_0",
    "BlockFormat",
    "Format",
    "FourBit",
    "Int8",
    "layout_formats",
    "make_block_format",
    "make_format",
    "register_format",
    "saved_formats",
]

_OURS: tuple[type[Format], ...] = (NF4, FP4, Int8, Q8_0, Q5_0, Q4_0)
for _kind in _OURS:
    register_format(_kind)


def make_block_format(name: str) -> BlockFormat:
    """`make_format` for callers that need a block format."""
    format = make_format(name)
    assert isinstance(format, BlockFormat), f"{name} is not stored in blocks"
    return format
