"""`LLM` with a prefix cache: what is kept between calls, and what must not be kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from conftest import make_model
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.ops.cache import KEY_BLOCK

SHORT, LONG = [9] * 20, [5 + j % 90 for j in range(400)]
PARAMS = SamplingParams(max_new_tokens=30, ignore_eos=True)


def make(tokenizer, **options) -> LLM:
    model = make_model(num_key_value_heads=2, max_position_embeddings=512)
    return LLM.from_parts(model, tokenizer, prefix_cache=True, **options)


def test_a_long_prompt_after_short_ones_fits_a_small_cache(tokenizer):
    llm = make(tokenizer, cache_bytes=1)
    expected = make(tokenizer).generate(LONG, PARAMS)
    llm.generate(SHORT, PARAMS)
    assert llm.generate(LONG, PARAMS) == expected
    assert llm.generate([SHORT, LONG], PARAMS)[1:] == expected


def test_a_stream_open_across_recompile_leaves_no_stale_keys(tokenizer):
    llm = make(tokenizer)
    stream = llm.stream(LONG, PARAMS)
    next(stream)
    with torch.no_grad():
        for parameter in llm.model.parameters():
            parameter.mul_(-0.7)
    llm.recompile()
    stream.close()
    expected = LLM.from_parts(llm.model, tokenizer).generate(LONG, PARAMS)
    assert llm.generate(LONG, PARAMS) == expected


def test_one_cache_is_kept_regardless_of_open_streams(tokenizer):
    llm = make(tokenizer, cache_bytes=512 * 1024)
    expected = llm.generate(LONG, PARAMS)[0]
    streams = [llm.stream(LONG, PARAMS) for _ in range(4)]
    for stream in streams:
        next(stream)
    runs = [weakref.ref(stream._pieces.gi_frame.f_locals["engine"]) for stream in streams]
    assert len({id(run()) for run in runs}) == 4
    for stream in streams:
        assert "".join(stream) != ""
        assert stream.completion == expected
    del stream, streams
    gc.collect()
    assert sum(run() is not None for run in runs) == 1


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_hundreds_of_prompts_in_a_tiny_cache_survive_an_interrupt(tokenizer, prefix_cache, monkeypatch):
    model = make_model(num_key_value_heads=2, max_position_embeddings=512)
    prompts = [[5 + (i + j) % 90 for j in range(1 + i * 37 % 300)] for i in range(300)]
    params = [SamplingParams(max_new_tokens=1 + i % 7, temperature=0.5, seed=i) for i in range(300)]
    llm = LLM.from_parts(model, tokenizer, prefix_cache=prefix_cache)
    expected = llm.generate(prompts, params)
    tiny = LLM.from_parts(
        model, tokenizer, prefix_cache=prefix_cache, cache_bytes=9 * KEY_BLOCK * llm.runner.position_bytes
    )
    forward, calls = type(tiny.runner).forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(type(tiny.runner), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(prompts, params)
    found = tiny.generate(prompts, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
