"""Cosines and sines of rotary embeddings for the kernels: looked up where they depend only on the position.

Shapes legend: N tokens, Dh head dim, P positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmoe.model import RotaryEmbedding
from olmoe.runner.base import Batch
from olmoe.runtime import inference_mode

_FIRST_POSITIONS = 256
# Up to this many cosines torch computes on the calling thread, even if it leaves them to MKL. After more, its other
# threads spin for milliseconds on cores that the kernels' threads need.
_SERIAL_ELEMENTS = 64


class Angles(NamedTuple):
    """Cosines and sines (P, Dh/2), contiguous fp32, and the row of each token (N)."""

    cos: Tensor
    sin: Tensor
    rows: list[int]


class RopeTable:
    """The angles of a model, computed by its own module. The table grows with the longest sequence seen."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        self._rotary = RotaryEmbedding(rotary.rope, rotary.head_dim, rotary.max_positions)
        self._table: tuple[Tensor, Tensor] | None = None  # replaced as a whole, for other threads' sake

    def reserve(self, positions: int) -> None:
        """Make room for that many positions now, rather than within a later call."""
        if self._rotary.rope.rope_type != "dynamic":
            self._grown(positions)

    @inference_mode
    def _grown(self, positions: int) -> tuple[Tensor, Tensor]:
        """The table, with room for that many positions."""
        table = self._table
        if table is None or positions > len(table[0]):
            count = _FIRST_POSITIONS
            while count < positions:
                count *= 2
            cos, sin = self._rotary(torch.arange(count))
            self._table = table = cos.contiguous(), sin.contiguous()
        return table

    @inference_mode
    def angles(self, batch: Batch) -> Angles:
        """The angles of every token of a call."""
        positions = batch.positions()
        if self._rotary.rope.rope_type != "dynamic":
            return Angles(*self._grown(max(positions) + 1), positions)
        totals = batch.totals or [a + b for a, b in zip(batch.lengths, batch.counts, strict=True)]
        lengths = [totals[b] for b in batch.sequence_of_token()]
        half = self._rotary.head_dim // 2
        cos, sin = torch.empty(len(positions), half), torch.empty(len(positions), half)
        # A decoding step has few tokens; a prompt has enough to be worth torch's threads.
        size = max(1, _SERIAL_ELEMENTS // half) if len(positions) == len(batch.counts) else len(positions)
        for start in range(0, len(positions), size):
            part = slice(start, start + size)
            cos[part], sin[part] = self._rotary(torch.tensor(positions[part]), torch.tensor(lengths[part]))
        return Angles(cos, sin, list(range(len(positions))))
