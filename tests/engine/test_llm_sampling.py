"""Sampling through `LLM`: the effect of penalties and biases on texts, and independence of request order."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_model
from olmoe import ops
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError

PROMPTS = ["Once upon a time", "The dog", "a", "happy day in the park"]


@pytest.fixture
def llm(tokenizer):
    return LLM.from_parts(make_model(seed=4), tokenizer)


def test_texts_do_not_depend_on_the_order_of_requests(llm):
    common = {"temperature": 1.0, "top_p": 0.95, "presence_penalty": 0.3, "ignore_eos": True}
    params = [SamplingParams(max_new_tokens=4 + 5 * n, seed=n, **common) for n in range(4)]
    alone = [llm.generate(prompt, p)[0].token_ids for prompt, p in zip(PROMPTS, params, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3]):
        together = llm.generate([PROMPTS[n] for n in order], [params[n] for n in order])
        assert [c.token_ids for c in together] == [alone[n] for n in order]


def test_a_frequency_penalty_ends_repetition(llm):
    free, penalized = (
        llm.generate("The dog", SamplingParams(max_new_tokens=40, ignore_eos=True, frequency_penalty=f))[0].token_ids
        for f in (0.0, 1e3)
    )
    assert len(set(penalized)) == 40  # greedy, with a penalty too large to repeat anything
    assert len(set(free)) < 40


def test_a_strongly_biased_token_always_comes_and_a_banned_one_never(llm):
    always = SamplingParams(max_new_tokens=5, logit_bias={9: 1e4}, temperature=1.0, ignore_eos=True)
    assert llm.generate("The dog", always)[0].token_ids == [9] * 5
    (token_id, *_) = llm.generate("The dog", SamplingParams(max_new_tokens=1))[0].token_ids
    never = SamplingParams(max_new_tokens=30, logit_bias={token_id: -math.inf}, temperature=2.0, seed=1)
    assert token_id not in llm.generate("The dog", never)[0].token_ids


def test_biases_outside_the_vocabulary_or_banning_everything_are_refused(llm):
    size = llm.tokenizer.vocab_size
    with pytest.raises(UserError, match=f"logit_bias holds the id {size}, but the tokenizer has {size} ids"):
        llm.generate("a", SamplingParams(logit_bias={3: 1.0, size: 1.0}))
    with pytest.raises(UserError, match="No token is left to choose"):
        llm.generate("a", SamplingParams(logit_bias=dict.fromkeys(range(size), -math.inf)))


def test_every_backend_samples_with_the_same_random_numbers(tokenizer):
    params = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
    texts = [
        LLM.from_parts(make_model(seed=4), tokenizer, backend=backend).generate(PROMPTS, params)
        for backend in (ops.AUTO, "torch", "reference")
    ]
    assert [c.token_ids for c in texts[0]] == [c.token_ids for c in texts[1]] == [c.token_ids for c in texts[2]]


def test_sampling_works_without_the_kernels(llm, absent):
    logits = torch.zeros(1, 4)
    assert ops.sample(logits, [ops.SamplingRow(temperature=1.0)], 4).ids.tolist() == [1]  # u is 0.4
