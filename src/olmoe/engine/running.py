"""Sequences that a runner works on together: their cache, their lengths, and what runs through the network next.

Shapes legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from olmoe.runner import Batch, CacheView, Runner, Want


class RunningSequences:
    """B sequences with room for `positions` tokens each, empty at first."""

    def __init__(self, runner: Runner, count: int, positions: int, cache_dtype: torch.dtype | None = None) -> None:
        self._runner = runner
        blocks = runner.new_cache(count, positions, cache_dtype)
        self._cache = CacheView(blocks, np.arange(blocks.blocks, dtype=np.int32).reshape(count, -1))
        self.lengths = [0] * count

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The prompts, none of them empty, of all sequences -> logits (B, V) after each.

        They run through the network in chunks of at most `Runner.chunk_tokens`, so that memory for activations does
        not grow with them and Ctrl-C takes effect between two chunks.
        """
        totals, start = [len(prompt) for prompt in prompts], [0] * len(prompts)
        last: list[Tensor] = []
        for counts in chunks(totals, self._runner.chunk_tokens):
            rows = [row for row, count in enumerate(counts) if count]
            batch = Batch(
                [i for row in rows for i in prompts[row][start[row] : start[row] + counts[row]]],
                [counts[row] for row in rows],
                [start[row] for row in rows],
                [totals[row] for row in rows],
            )
            start = [a + b for a, b in zip(start, counts, strict=True)]
            ends = [end for row, end in zip(rows, batch.ends(), strict=True) if start[row] == totals[row]]
            view = CacheView(self._cache.blocks, self._cache.table[rows])
            last.append(self._runner.forward(batch, view, Want(ends)).logits)
        self.lengths = totals
        return last[0] if len(last) == 1 else torch.cat(last)

    def step(self, token_ids: Sequence[int]) -> Tensor:
        """One new token of each sequence -> logits (B, V) after it."""
        batch = Batch(token_ids, [1] * len(token_ids), self.lengths)
        logits = self._runner.forward(batch, self._cache, Want(range(len(token_ids)))).logits
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order. Nothing is copied."""
        self._cache = CacheView(self._cache.blocks, np.ascontiguousarray(self._cache.table[list(rows)]))
        self.lengths = [self.lengths[row] for row in rows]


def chunks(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Tokens of each sequence in each chunk: `size` in total except in the last, one sequence after another."""
    left = list(lengths)
    while any(left):
        room, counts = size, []
        for length in left:
            counts.append(min(length, room))
            room -= counts[-1]
        left = [length - count for length, count in zip(left, counts, strict=True)]
        yield counts
