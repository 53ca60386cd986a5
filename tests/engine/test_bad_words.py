from __future__ import annotations

import numpy as np
import pytest

from olmoe import LLM, SamplingParams
from olmoe.engine.bad_words import BadWords
from olmoe.errors import UserError


def banned(state, size: int = 3) -> set[int]:
    mask = np.empty(size, dtype=np.int32)
    state.fill(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little") == 0).tolist())


def test_the_last_token_is_banned_after_the_others():
    state = BadWords([(5,), (1, 2), (1, 2, 95), ()]).start()
    assert banned(state) == {5}
    state.accept(1)
    assert banned(state) == {5, 2}
    state.accept(1)
    assert banned(state) == {5, 2}
    state.accept(2)  # letting the banned token through is an error
    assert banned(state) == {5, 95}
    state.accept(31)
    assert banned(state) == {5}
    assert not state.finished


def test_the_sign_bit_of_a_mask_word_works_like_others():
    assert banned(BadWords([(31,), (63,)]).start()) == {31, 63}


class Even:
    """Allows even tokens, three of them."""

    def start(self):
        self.seen = []
        return self

    @property
    def finished(self):
        return len(self.seen) == 3

    def fill(self, mask):
        mask.fill(0x55555555)

    def accept(self, token_id):
        self.seen.append(token_id)


def test_bad_words_combine_with_a_grammar():
    within = Even()
    state = BadWords([(4,)], within).start()
    assert banned(state) == {*range(1, 96, 2), 4}
    for token_id in (2, 6, 8):
        assert not state.finished
        state.accept(token_id)
    assert state.finished
    assert within.seen == [2, 6, 8]


def test_bad_words_are_never_generated():
    llm = LLM()
    prompt, params = "Once upon a time", {"max_new_tokens": 40}
    text = llm.generate(prompt, SamplingParams(**params))[0].text
    words = [" Lily", "little girl", "named"]
    assert all(word in text for word in words)
    grammar = BadWords.of_words(words, llm.tokenizer)
    other = llm.generate(prompt, SamplingParams(**params, grammar=grammar))[0].text
    assert other
    assert not any(word in other for word in words)


@pytest.mark.parametrize("words", [[""], ["ok", " \n"]])
def test_blank_bad_words_are_refused(tokenizer, words):
    with pytest.raises(UserError, match="bad_words must be made of words"):
        BadWords.of_words(words, tokenizer)
