"""What completions report besides text, which prompt an error concerns, and batches larger than memory."""

from __future__ import annotations

import io
import logging
import math
import sys
import types
import weakref

import numpy as np
import pytest
import torch

from configurations import VOCAB_SIZE
from conftest import make_model
from olmoe.engine import engine as engine_module
from olmoe.engine import llm as llm_module
from olmoe.engine.engine import Engine
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.model import causal_attend
from olmoe.ops import cpu
from olmoe.runner import TorchRunner

kernels = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}"))
PROMPTS = ["Once upon a time", "O", "The dog ran to the park. They were very happy.", "the girl"]


@pytest.fixture(scope="module")
def llm(tokenizer) -> LLM:
    return LLM.from_parts(make_model(), tokenizer)


# ---- log-probabilities ----


@torch.inference_mode()
def distributions(model, ids: list[int], new: list[int], allowed: int = VOCAB_SIZE) -> torch.Tensor:
    """Log-probabilities (tokens, V) at the position of each new id, from one pass over the whole sequence."""
    batch = torch.tensor([ids + new])
    hidden = model(batch, torch.arange(batch.shape[1])[None], causal_attend).hidden
    return model.logits(hidden[0, len(ids) - 1 : -1])[:, :allowed].log_softmax(-1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.8, "seed": 1, "top_k": 3}, {"temperature": 1.5, "seed": 2, "repetition_penalty": 1.7}],
    ids=str,
)
def test_logprobs_are_the_models_own(llm, tokenizer, changes):
    params = SamplingParams(max_new_tokens=12, logprobs=4, ignore_eos=True, **changes)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        expected = distributions(llm.model, tokenizer.encode(prompt), completion.token_ids)
        assert [each.token_id for each in completion.logprobs] == completion.token_ids
        for each, row in zip(completion.logprobs, expected, strict=True):
            assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
            assert list(each.top.values()) == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
            for token, logprob in each.top.items():
                assert logprob == pytest.approx(float(row[token]), abs=1e-4)
            if not changes:
                assert next(iter(each.top.items())) == (each.token_id, each.logprob)
        (alone,) = llm.generate(prompt, params)
        assert alone.logprobs == completion.logprobs
        assert alone.text == completion.text


def test_logprobs_are_returned_only_on_request(llm):
    assert llm.generate("dog", SamplingParams(max_new_tokens=3))[0].logprobs is None
    (completion,) = llm.generate("dog", SamplingParams(max_new_tokens=3, logprobs=0, ignore_eos=True))
    assert [each.top for each in completion.logprobs] == [{}] * 3
    (completion,) = llm.generate("dog", SamplingParams(max_new_tokens=1, logprobs=10**6))
    assert len(completion.logprobs[0].top) == VOCAB_SIZE
    assert sum(map(math.exp, completion.logprobs[0].top.values())) == pytest.approx(1, abs=1e-5)


def test_logprobs_exclude_padding_rows_and_come_with_streams(tokenizer):
    model = make_model(vocab_size=VOCAB_SIZE + 8)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] *= 100.0
    stream = LLM.from_parts(model, tokenizer).stream("dog", SamplingParams(max_new_tokens=5, logprobs=2))
    next(stream)
    stream.close()
    (*_, last) = stream.completion.logprobs
    assert len(stream.completion.logprobs) == len(stream.completion.token_ids)
    ids = stream.completion.token_ids
    expected = distributions(model, tokenizer.encode("dog"), ids)[-1]
    assert last.logprob == pytest.approx(float(expected[ids[-1]]), abs=1e-4)


# ---- timings ----


def test_timings_of_a_completion_are_those_of_its_own_text(llm, monkeypatch):
    clock = [1.0]
    monkeypatch.setattr(engine_module, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    forward = type(llm._runner).forward

    def timed(*arguments):
        clock[0] += 1.0
        return forward(*arguments)

    monkeypatch.setattr(type(llm._runner), "forward", timed)
    monkeypatch.setattr(llm_module, "MOST_SEQUENCES", 2)
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 6, 3, 9)]
    timings = [c.timings for c in llm.generate(["dog"] * 4, params)]
    assert all(each.prefill_seconds == 1 for each in timings)
    assert [each.queue_seconds for each in timings] == [0, 0, 1, 4]  # finished requests make room for the next
    assert [each.decode_seconds for each in timings] == [0, 5, 2, 8]


def test_timings_are_in_wall_clock_seconds(llm):
    stream = llm.stream("dog", SamplingParams(max_new_tokens=5, ignore_eos=True))
    list(stream)
    timings, statistics = stream.completion.timings, stream.statistics
    assert timings.prefill_seconds == statistics.prefill_seconds > 0
    assert 0 < timings.decode_seconds <= statistics.decode_seconds
    assert 0 <= timings.queue_seconds < timings.total_seconds


# ---- which prompt ----


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["dog", ""], r"^The prompt is empty; give at least one character \(prompts\[1\]\)\.$"),
        ([[5], [6], [VOCAB_SIZE]], rf"id {VOCAB_SIZE}, outside the vocabulary of {VOCAB_SIZE} \(prompts\[2\]\)\.$"),
        ([[5] * 200, "dog"], r"context ends at 128; shorten it \(prompts\[0\]\)\.$"),
        (["dog", "\udcff"], r"^The text is not valid Unicode.*\(prompts\[1\]\)\.$"),
        (np.array([[5, 6], [5, -1]]), r"\(prompts\[1\]\)\.$"),
        ([""], r"^The prompt is empty; give at least one character\.$"),
    ],
)
def test_an_error_names_the_prompt(llm, prompts, sentence):
    with pytest.raises(UserError, match=sentence):
        llm.generate(prompts)


def test_a_broken_model_names_the_affected_prompt(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(UserError, match=r"^The model's logits are not finite.* \(prompts\[2\]\)\.$"):
        LLM.from_parts(model, tokenizer).generate([[5], [6], [7]], SamplingParams(max_new_tokens=1))


def test_a_full_context_warns_once_and_names_the_prompts(llm, caplog):
    params = SamplingParams(max_new_tokens=50, ignore_eos=True)
    with caplog.at_level(logging.WARNING, logger="olmoe"):
        llm.generate([[5] * 10, [5] * 120], params)
        llm.generate([[5] * 10, [5] * 120, [5] * 100], params)
    assert [r.getMessage() for r in caplog.records] == [
        "only 8 of 50 new tokens fit the context of 128 (prompts[1])",
        "only 8 of 50 new tokens fit the context of 128 (prompts[1] and 1 more)",
    ]


# ---- threads ----


def test_the_number_of_threads_is_that_of_the_process(tokenizer, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    LLM.from_parts(make_model(), tokenizer)
    LLM.from_parts(make_model(), tokenizer, threads=3)
    LLM.from_parts(make_model(), tokenizer, threads=np.int64(2))
    assert seen == [3, 2]
    for threads in (0, -1, 2.5, True, "4", 10**9):
        with pytest.raises(UserError, match=r"^The number of threads must be from 1 to 1024, not "):
            LLM.from_parts(make_model(), tokenizer, threads=threads)
        with pytest.raises(UserError, match=r"^The number of threads must be from 1 to 1024, not "):
            LLM("nowhere", threads=threads)


# ---- batches larger than the memory ----


class Recorded(Engine):
    """Engines that record the cache bytes of all live engines when one is created."""

    sizes: list[int]
    alive: weakref.WeakSet[Engine]

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.alive.add(self)
        tensors = [t for each in self.alive for t in (*each._cache.keys, *each._cache.values)]
        self.sizes.append(sum(t.numel() * t.element_size() for t in tensors))


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    Recorded.sizes, Recorded.alive = [], weakref.WeakSet()
    monkeypatch.setattr(llm_module, "Engine", Recorded)
    return Recorded.sizes


def token_bytes(model) -> int:
    """Bytes per token of an fp32 cache."""
    config = model.config
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * 4


@pytest.mark.parametrize("backend", [kernels, "torch"])
def test_a_large_batch_stays_within_its_memory_and_gives_the_same_texts(tokenizer, sizes, backend):
    model = make_model(num_key_value_heads=2)
    per_token = token_bytes(model)
    prompts = [[5 + (i * 7 + j) % 200 for j in range(1 + i * 13 % 90)] for i in range(60)]
    params = [
        SamplingParams(max_new_tokens=1 + i % 11, temperature=0.9 * (i % 2), seed=i, logprobs=1) for i in range(60)
    ]
    bounded = LLM.from_parts(model, tokenizer, backend=backend, cache_bytes=250 * per_token)
    found = bounded.generate(prompts, params)
    assert len(sizes) == 1
    assert max(sizes) <= 250 * per_token
    sizes.clear()
    unbounded = LLM.from_parts(model, tokenizer, backend=backend)
    together = unbounded.generate(prompts, params)
    assert len(sizes) == 1
    alone = [unbounded.generate(prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert [c.token_ids for c in found] == [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in found] == [c.text for c in alone]
    if backend == "cpu":
        assert found == together == alone


def test_memory_does_not_grow_with_the_number_of_prompts(tokenizer, sizes):
    model = make_model()
    llm = LLM.from_parts(model, tokenizer, cache_bytes=400 * token_bytes(model))
    largest = []
    for count in (10, 300):
        sizes.clear()
        assert len(llm.generate([[5] * 90] * count, SamplingParams(max_new_tokens=2))) == count
        largest.append(max(sizes))
    assert largest[0] == largest[1]


def test_a_text_larger_than_the_memory_limit_is_generated_alone(tokenizer, sizes):
    model = make_model()
    llm = LLM.from_parts(model, tokenizer, cache_bytes=1)
    params = SamplingParams(max_new_tokens=4)
    assert llm.generate(PROMPTS, params) == LLM.from_parts(model, tokenizer).generate(PROMPTS, params)
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_cache_bytes_must_be_a_whole_number(tokenizer, value):
    with pytest.raises(UserError, match=r"^cache_bytes must be a whole number, at least 1, not "):
        LLM.from_parts(make_model(), tokenizer, cache_bytes=value)


def test_every_pass_has_a_bounded_number_of_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(TorchRunner, "chunk_tokens", 20)
    model, seen = make_model(), []
    llm = LLM.from_parts(model, tokenizer, backend="torch")
    prompts = [[5] * 12, [6] * 8, [7] * 30, [8], [9] * 19, [10] * 2]
    expected = [llm.generate(prompt, SamplingParams(max_new_tokens=6))[0].token_ids for prompt in prompts]
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].numel()))
    llm.recompile()
    found = llm.generate(prompts, SamplingParams(max_new_tokens=6))
    assert [c.token_ids for c in found] == expected
    assert seen[:3] == [20, 20, 20]  # prompt tokens together with tokens being decoded
    assert max(seen) == 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_is_shown_for_many_prompts_on_a_terminal(llm, monkeypatch, capsys):
    params = SamplingParams(max_new_tokens=1)
    for count, options, shown in ((40, {}, True), (3, {}, False), (40, {"show_progress": False}, False)):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        llm.generate(["dog"] * count, params, **options)
        assert ("40/40" in terminal.getvalue()) == shown
        assert bool(terminal.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", None)
    llm.generate(["dog"] * 40, params)
    monkeypatch.undo()
    llm.generate(["dog"] * 40, params)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("backend", [kernels, "torch"])
def test_an_int8_cache_takes_less_memory_and_gives_nearly_the_same(tokenizer, sizes, backend):
    model, found = make_model(num_key_value_heads=2), []
    for dtype in (None, "int8", torch.int8):
        llm = LLM.from_parts(model, tokenizer, backend=backend, cache_dtype=dtype)
        (completion,) = llm.generate([[7, 8, 9] * 20], SamplingParams(max_new_tokens=4, logprobs=0, ignore_eos=True))
        found.append([entry.logprob for entry in completion.logprobs])
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert found[0] != found[1] == found[2]
    assert sizes[1] < sizes[0] / 2
    with pytest.raises(UserError, match="The KV cache cannot be of int4; choose"):
        LLM.from_parts(model, tokenizer, backend=backend, cache_dtype="int4")


# ---- one after another ----


def test_completions_arrive_as_they_finish_with_their_index(llm):
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (9, 1, 4, 2)]
    found = list(llm.as_completed(PROMPTS, params))
    assert [number for number, _ in found] == [1, 3, 2, 0]
    expected = llm.generate(PROMPTS, params)
    assert all(completion == expected[number] for number, completion in found)
    assert list(llm.as_completed([])) == []
    with pytest.raises(UserError, match="empty"):
        llm.as_completed(["dog", ""])  # before the first item is requested


def test_few_requests_run_at_once_and_iteration_can_stop_early(llm, monkeypatch):
    engines, make = [], LLM._engine
    monkeypatch.setattr(LLM, "_engine", lambda *arguments: engines.append(make(*arguments)) or engines[-1])
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    iterator = llm.as_completed(PROMPTS, params, most_sequences=1)
    first, _ = next(iterator)
    assert first == 0
    assert engines[0].statistics().running + engines[0].statistics().waiting == len(PROMPTS) - 1
    iterator.close()
    assert not engines[0].has_work
