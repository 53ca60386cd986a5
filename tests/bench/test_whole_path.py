"""Decoding through tokenizer, sampling and text beside bare steps. Numbers of seconds are never asserted."""

from __future__ import annotations

import pytest

from conftest import make_model
from olmoe.bench.speed import Measured
from olmoe.bench.whole_path import WholePath, measure_whole_path, stand_in_tokenizer
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.tokenizer import IncrementalDetokenizer

SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=3, max_new_tokens=2, stop=["a"])


@pytest.mark.parametrize("size", [100, 256, 320, 50304])
def test_a_stand_in_has_all_ids_and_its_text_comes_back(size):
    tokenizer = stand_in_tokenizer(size, [size - 1])
    assert tokenizer.vocab_size == size
    pieces = {tokenizer.token_bytes(i) for i in range(size)}
    assert len(pieces) == size
    assert b"" not in pieces
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.add(size - 1) == ""  # the end of a text is none of it
    assert tokenizer.decode(tokenizer.encode("abc!?")) == "abc!?"


class Watched:
    """An `LLM` that notes what it is asked for."""

    def __init__(self, llm):
        self.llm, self.tokenizer, self.asked = llm, llm.tokenizer, []

    def stream(self, prompt, params):
        self.asked.append((prompt, params))
        return self.llm.stream(prompt, params)


def test_both_take_turns_and_every_step_is_counted():
    model = make_model()
    llm = Watched(LLM.from_parts(model, stand_in_tokenizer(model.config.vocab_size, [5])))
    turns = []
    speed = measure_whole_path(
        Measured(model),
        WholePath(llm, 7, SAMPLED),
        context=7,
        decode=9,
        rounds=3,
        progress=lambda *counts: turns.append(counts),
    )
    assert turns == [(n, 6) for n in range(1, 7)]
    assert all(value > 0 for value in speed.values())
    prompts, params = zip(*llm.asked[1:], strict=True)  # the first warms up
    assert [len(prompt) for prompt in prompts] == [7, 7, 7]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    for each in params:  # the sampling that was asked for, and no end but that of the steps
        assert (each.temperature, each.top_k, each.top_p, each.seed) == (0.8, 40, 0.95, 3)
        assert (each.max_new_tokens, each.ignore_eos, each.stop) == (10, True, ())


@pytest.mark.parametrize("zero", ["context", "decode", "rounds"])
def test_numbers_below_one_are_refused(zero):
    model = make_model()
    whole = WholePath(LLM.from_parts(model, stand_in_tokenizer(model.config.vocab_size)), 3, SAMPLED)
    numbers = {"context": 3, "decode": 2, "rounds": 1} | {zero: 0}
    with pytest.raises(UserError, match="at least 1"):
        measure_whole_path(Measured(model), whole, **numbers)
