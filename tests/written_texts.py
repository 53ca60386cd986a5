"""Random texts of a grammar, and whether a text belongs to one: by the masks, token by token."""

from __future__ import annotations

import numpy as np


def allowed(state, tokenizer) -> np.ndarray:
    """The ids that may come next, from a mask that held rubbish."""
    mask = np.full(-(-tokenizer.vocab_size // 32) + 3, -1, dtype=np.int32)
    state.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def write(grammar, tokenizer, seed: int = 0, most: int = 2000) -> str:
    """A random text of a grammar; likes to close what is open, so that it ends."""
    random, state, ids = np.random.default_rng(seed), grammar.start(), list[int]()
    closing = [i for i in range(tokenizer.vocab_size) if set(tokenizer.token_bytes(i)) & set(b'"]},')]
    while not state.finished:
        assert len(ids) < most
        choices = allowed(state, tokenizer)
        assert len(choices)
        ends = [*np.intersect1d(choices, closing), *(i for i in tokenizer.eos_ids if i in choices)]
        token_id = int(random.choice(ends if ends and random.random() < 0.4 else choices))
        state.accept(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids)


def accepts(grammar, tokenizer, text: str) -> bool:
    """Whether the text belongs to the grammar, token by token, and may end there."""
    state = grammar.start()
    for token_id in tokenizer.encode(text):
        if state.finished or token_id not in allowed(state, tokenizer):
            return False
        state.accept(token_id)
    return state.finished or bool(set(tokenizer.eos_ids) & set(allowed(state, tokenizer)))
