"""Cosines and sines of rotary embeddings for the kernels: looked up where they depend on the position alone.

Shapes legend: N tokens, Dh head dim, P positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmoe.model import RotaryEmbedding
from olmoe.runner.base import Batch

_FIRST_POSITIONS = 256


class Angles(NamedTuple):
    """Cosines and sines (P, Dh/2), contiguous fp32, and the row of each token (N)."""

    cos: Tensor
    sin: Tensor
    rows: list[int]


class RopeTable:
    """The angles of a model, computed by its own module. It grows with the longest sequence that was seen."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        self._rotary = RotaryEmbedding(rotary.rope, rotary.head_dim, rotary.max_positions)
        self._table: tuple[Tensor, Tensor] | None = None  # replaced whole, so that threads see one or the other

    @torch.inference_mode()
    def angles(self, batch: Batch) -> Angles:
        """Those of every token of a call."""
        positions = batch.positions()
        if self._rotary.rope.rope_type == "dynamic":
            totals = batch.totals or [a + b for a, b in zip(batch.lengths, batch.counts, strict=True)]
            length = torch.tensor([totals[b] for b in batch.sequence_of_token()])
            cos, sin = self._rotary(torch.tensor(positions), length)
            return Angles(cos.contiguous(), sin.contiguous(), list(range(len(positions))))
        last, table = max(positions), self._table
        if table is None or last >= len(table[0]):
            count = _FIRST_POSITIONS
            while count <= last:
                count *= 2
            cos, sin = self._rotary(torch.arange(count))
            self._table = table = cos.contiguous(), sin.contiguous()
        return Angles(*table, positions)
