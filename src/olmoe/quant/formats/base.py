"""What a weight format is: the named parts that a matrix is stored in, and encoding and decoding.

Shapes legend: N chosen rows, R rows (outputs), C columns (inputs) of a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# The part that has the matrix's own name; the others append theirs to it.
CODES = "codes"


class Format(ABC):
    """Encodes one matrix (R, C) at a time, so that each expert of a stack can be decoded by itself."""

    name: str
    bits: int  # of one weight's code
    # How a checkpoint describes which modules are packed. True: it names those that are skipped, as in bitsandbytes'
    # config, and one format for all others. False: it has a format for each matrix (`olmoe.quant.layout`).
    skips_modules = False

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape can be stored; one that cannot stays plain."""
        return rows > 0 and columns > 0

    def with_packed_scales(self) -> Format:
        """The same format with its scales quantized too ("double quantization"), if it supports that; else itself."""
        return self

    @abstractmethod
    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every part that stores a matrix of this shape; `CODES` is one of them."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """weight (R, C), any floating dtype -> its parts."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The parts of a matrix -> (R, C), computed in fp32 and rounded once to `dtype`."""

    def decode_rows(self, parts: dict[str, Tensor], row_ids: Tensor, rows: int, columns: int) -> Tensor:
        """The rows `row_ids` (N,) of the matrix, (N, C) in fp32. Formats that are able to read no others."""
        return self.decode(parts, rows, columns, torch.float32)[row_ids]
