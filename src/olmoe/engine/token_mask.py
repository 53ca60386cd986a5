"""Which tokens may come next in a text: those its parameters allow, no end before `min_tokens`, and its grammar."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olmoe.engine.sampling_params import SamplingParams

Words = npt.NDArray[np.int32]


class TokenMask:
    """The mask of one text for each of its tokens, as `SamplingRow.mask` takes it: bit i of word w is token 32 w + i.

    `ends` are the ids that end a text, which `min_tokens` keeps out.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, ends: Iterable[int]) -> None:
        self._allowed = None
        if params.allowed_token_ids is not None:
            self._allowed = words_of(params.allowed_token_ids, vocab_size)
        self._min_tokens = params.min_tokens
        self._not_ends = ~words_of([*ends, *params.stop_token_ids], vocab_size)
        self.grammar = None if params.grammar is None else params.grammar.start()
        self._words = np.empty(-(-vocab_size // 32), dtype=np.int32)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether these parameters exclude any token."""
        return params.grammar is not None or params.allowed_token_ids is not None or params.min_tokens > 0

    def next(self, generated: int) -> Tensor | None:
        """The mask after `generated` tokens; None allows all. It is valid until the next call."""
        parts = []
        if self._allowed is not None:
            parts.append(self._allowed)
        if generated < self._min_tokens:
            parts.append(self._not_ends)
        if self.grammar is not None:
            self.grammar.fill(self._words)
            parts.insert(0, self._words)
        if not parts:
            return None
        if parts[0] is not self._words:
            np.copyto(self._words, parts[0])
        for part in parts[1:]:
            self._words &= part
        return torch.from_numpy(self._words)

    def accept(self, token_id: int) -> bool:
        """Continue after a chosen token -> whether nothing may follow it."""
        if self.grammar is None:
            return False
        self.grammar.accept(token_id)
        return self.grammar.finished


def words_of(ids: Iterable[int], vocab_size: int) -> Words:
    """A mask with the bits of these ids set; those outside the vocabulary are ignored."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[[i for i in ids if i < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
