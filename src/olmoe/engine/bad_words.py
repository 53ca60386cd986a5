"""Words that a text may not contain: sequences of tokens whose last one is banned after the others.

As in vLLM, a word is banned as the tokenizer writes it alone and after a space; in other tokens it can still appear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from olmoe.engine.sampling_params import Grammar, GrammarState
from olmoe.errors import UserError
from olmoe.tokenizer import Tokenizer


class BadWords:
    """A `Grammar` of all texts without the sequences, or of those among them that another grammar allows."""

    def __init__(self, sequences: Iterable[Sequence[int]], within: Grammar | None = None) -> None:
        self.sequences = tuple(dict.fromkeys(tuple(sequence) for sequence in sequences if sequence))
        self._within = within

    @classmethod
    def of_words(cls, words: Sequence[str], tokenizer: Tokenizer, within: Grammar | None = None) -> BadWords:
        """Ban these words. Raises `UserError` for one without a visible character."""
        blank = [word for word in words if not word.strip()]
        if blank:
            raise UserError(f"bad_words must be made of words, not {blank[0]!r}.")
        plain = [word.lstrip(" ") for word in words]
        return cls(tokenizer.encode_batch([*plain, *(f" {word}" for word in plain)]), within)

    def start(self) -> _State:
        """The state before the first token."""
        return _State(self.sequences, None if self._within is None else self._within.start())


class _State:
    """The end of what has been generated, as long as the longest banned sequence."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], within: GrammarState | None) -> None:
        self._sequences, self._within = sequences, within
        self._longest = max((len(sequence) for sequence in sequences), default=1) - 1
        self._last: tuple[int, ...] = ()
        self.finished = within is not None and within.finished

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next."""
        if self._within is None:
            mask.fill(-1)
        else:
            self._within.fill(mask)
        words = mask.view(np.uint32)
        for *before, last in self._sequences:
            if not before or self._last[-len(before) :] == tuple(before):
                words[last >> 5] &= np.uint32(~(1 << (last & 31)) & 0xFFFFFFFF)

    def accept(self, token_id: int) -> None:
        """Continue after a token that the mask allowed."""
        if self._within is not None:
            self._within.accept(token_id)
            self.finished = self._within.finished
        self._last = (*self._last, token_id)[-self._longest :] if self._longest else ()
