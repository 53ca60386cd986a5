"""lm_eval's clients for local servers: log-likelihoods equal one pass through the network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from olmoe import SamplingParams
from olmoe.runner import Batch, CacheView, Want

pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

PAIRS = [
    ("Once upon a time", " there was a little girl named Lily."),
    ("The dog ran to the", " park"),
    ("She had a red", " ball and a big dog. They played all day."),
    ("One day", ", the cat saw a 𝄞 and a ☃."),
    ("", "Once upon a time"),
]


def instances(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def completions(server):
    return LocalCompletionsAPI(
        base_url=server.url + "/v1/completions", model="olmoe-tiny", tokenizer_backend="remote", max_length=512,
        batch_size=2, num_concurrent=1, seed=1, eos_string="<|endoftext|>",
    )  # fmt: skip


def own(llm, context: str, continuation: str) -> tuple[float, bool]:
    """The same from one pass of all tokens through the network, without engine or cache."""
    ids, before = llm.tokenizer.encode(context + continuation), len(llm.tokenizer.encode(context))
    if not context:
        ids, before = [llm.tokenizer.eos_ids[0], *ids], 1
    cache = llm.runner.new_cache(1, len(ids), block_size=64)
    batch, rows = Batch(ids, [len(ids)], [0]), list(range(len(ids)))
    logits = llm.runner.forward(batch, CacheView(cache, np.zeros((1, 1), np.int32)), Want(rows)).logits
    logprobs = logits[:-1, : llm.tokenizer.vocab_size].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[before - 1 :]
    return float(chosen.sum()), bool((logprobs[before - 1 :].argmax(-1) == torch.tensor(ids[before:])).all())


def test_log_likelihoods_equal_our_own(completions, tiny_llm):
    results = completions.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    engine = []
    for context, continuation in PAIRS:
        before = len(tiny_llm.tokenizer.encode(context)) or 1
        start = [] if context else [tiny_llm.tokenizer.eos_ids[0]]
        ids = start + tiny_llm.tokenizer.encode(context + continuation)
        (scored,) = tiny_llm.generate([ids], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
        engine.append(sum(each.logprob for each in scored.prompt_logprobs[before:]))
    assert [value for value, _ in results] == pytest.approx(engine, abs=1e-5)


def test_log_likelihoods_equal_the_networks(completions, tiny_llm):
    results = completions.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (value, greedy), (context, continuation) in zip(results, PAIRS, strict=True):
        expected, expected_greedy = own(tiny_llm, context, continuation)
        assert value == pytest.approx(expected, abs=1e-5)
        assert greedy == expected_greedy


def test_rolling_log_likelihoods(completions):
    (value,) = completions.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(PAIRS[0][0] + PAIRS[0][1],)]), disable_tqdm=True
    )
    assert -60 < float(value) < -1


def test_generations(completions, server, tiny_llm):
    asked = [("Once upon a time", {"until": ["."], "max_gen_toks": 40, "temperature": 0})]
    (text,) = completions.generate_until(instances("generate_until", asked), disable_tqdm=True)
    (expected,) = tiny_llm.generate("Once upon a time", SamplingParams(max_new_tokens=40, stop=["."]))
    assert text == expected.text
    chat = LocalChatCompletion(base_url=server.url + "/v1/chat/completions", model="olmoe-tiny", max_length=512)
    messages = [{"role": "user", "content": "Tell me a story."}]

    asked = [(JsonChatStr(json.dumps(messages)), {"until": ["\n\n"], "max_gen_toks": 30, "temperature": 0})]
    (text,) = chat.generate_until(instances("generate_until", asked), disable_tqdm=True)
    (expected,) = tiny_llm.chat(messages, SamplingParams(max_new_tokens=30, stop=["\n\n"]))
    assert text == expected.text
