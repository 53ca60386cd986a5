"""Traces of an engine look as if each text had run alone, whatever happened on the way."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import make_model
from olmoe.analysis.trace import record
from olmoe.engine.engine import Engine
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.tracing import RequestTraces
from olmoe.ops.cpu import extension
from olmoe.runner import RouterPolicy, Trace, TraceWriter, make_runner
from sentences import refused

BACKEND = "torch" if extension.unavailable() else "cpu"
PROMPTS = [[5 + (i * 7 + j * 3) % 200 for j in range(1 + i * 37 % 150)] for i in range(8)]
SHARED = [[7 + j % 50 for j in range(130)] + [5 + i] for i in range(4)]


@pytest.fixture(scope="module")
def model():
    return make_model(num_key_value_heads=2, max_position_embeddings=512)


@pytest.fixture(scope="module")
def runner(model):
    return make_runner(model, BACKEND)


@pytest.fixture
def llm(model, tokenizer):
    return LLM.from_parts(model, tokenizer, backend=BACKEND)


def params_of(i: int, **others) -> SamplingParams:
    return SamplingParams(max_new_tokens=2 + 3 * i, temperature=0.9 * (i % 2), seed=i, ignore_eos=True, **others)


def expected(runner, path, texts) -> Trace:
    """The same texts, traced as `olmoe analyze` does."""
    with TraceWriter.of(runner.config, path) as writer:
        list(record(runner, texts, writer))
    return writer.trace


def assert_alike(found: Trace, wanted: Trace) -> None:
    assert found.input_ids.tolist() == wanted.input_ids.tolist()
    assert found.starts.tolist() == wanted.starts.tolist()
    np.testing.assert_array_equal(found.expert_ids, wanted.expert_ids)
    np.testing.assert_allclose(found.weights, wanted.weights, atol=0 if BACKEND == "cpu" else 2e-3)


def computed(prompts, completions) -> list[list[int]]:
    """The tokens that went through the network; a text's last token does not."""
    return [[*ids, *text.token_ids[:-1]] for ids, text in zip(prompts, completions, strict=True)]


def test_every_text_of_a_batch_is_traced(llm, runner, tmp_path):
    params = [params_of(i) for i in range(len(PROMPTS))]
    plain = llm.generate(PROMPTS, params)
    traced = llm.generate(PROMPTS, params, trace=tmp_path / "new" / "trace.safetensors")
    assert traced == plain
    found = Trace.open(tmp_path / "new" / "trace.safetensors")
    assert_alike(found, expected(runner, tmp_path / "alone", computed(PROMPTS, traced)))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["trace.safetensors"]


def test_shared_prefixes_are_traced_for_every_text(llm, runner, tmp_path):
    kept = LLM.from_parts(llm.model, llm.tokenizer, backend=BACKEND, prefix_cache=True)
    kept.generate(SHARED, params_of(1))
    texts = kept.generate(SHARED, params_of(1), trace=tmp_path / "t")
    assert_alike(Trace.open(tmp_path / "t"), expected(runner, tmp_path / "alone", computed(SHARED, texts)))
    assert len(kept._idle) == 1  # the engine with the cached prefixes still exists


def test_chats_and_streams_are_traced(llm, runner, tmp_path):
    (answer,) = llm.chat([{"role": "user", "content": "Hello"}], params_of(1), trace=tmp_path / "chat")
    found = Trace.open(tmp_path / "chat")
    assert len(found) == answer.prompt_tokens + len(answer.token_ids) - 1
    stream = llm.stream(PROMPTS[3], params_of(4), trace=tmp_path / "stream")
    assert not (tmp_path / "stream").exists()
    list(stream)
    wanted = expected(runner, tmp_path / "alone", computed([PROMPTS[3]], [stream.completion]))
    assert_alike(Trace.open(tmp_path / "stream"), wanted)
    with llm.stream(PROMPTS[3], params_of(4), trace=tmp_path / "left") as stream:
        next(stream)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "chat", "stream"]


def test_one_writer_accepts_several_calls(llm, runner, tmp_path):
    with TraceWriter.of(llm.config, None) as writer:
        texts = [llm.generate(prompt, params_of(2), trace=writer)[0] for prompt in PROMPTS[:3]]
    assert_alike(writer.trace, expected(runner, tmp_path / "alone", computed(PROMPTS[:3], texts)))


def test_policies_with_more_and_fewer_experts_are_traced(llm, tmp_path):
    k = llm.config.num_experts_per_tok
    params = [params_of(1, router_policy=RouterPolicy(top_k=n)) for n in (1, k + 1)] + [params_of(1)]
    llm.generate(PROMPTS[2:5], params, trace=tmp_path / "t")
    trace = Trace.open(tmp_path / "t")
    chosen = [(trace.expert_ids[window] != 255).sum(axis=2) for window in trace.windows()]
    assert [set(each.flatten().tolist()) for each in chosen] == [{1}, {k + 1}, {k}]
    with TraceWriter.of(llm.config, None) as writer:
        assert f"top_k={k + 1}" in refused(lambda: llm.generate(PROMPTS[0], params[1], trace=writer))


def test_unwritable_paths_are_refused_before_generating(llm, tmp_path):
    (tmp_path / "file").touch()
    for trace in (tmp_path / "file" / "t", tmp_path):
        refused(lambda trace=trace: llm.stream(PROMPTS[0], trace=trace))
    assert llm.generate([], trace=tmp_path / "none") == []
    assert len(Trace.open(tmp_path / "none")) == 0


@pytest.mark.parametrize("options", [{"blocks": 64}, {"blocks": 6}, {"blocks": 6, "token_budget": 33}])
def test_each_token_is_traced_once(runner, tokenizer, tmp_path, options):
    options = dict(options)
    cache_bytes = options.pop("blocks") * 64 * runner.position_bytes
    steps = []
    with TraceWriter.of(runner.config, tmp_path / "t") as writer:
        traces = RequestTraces(writer)

        def on_trace(traced):
            steps.append(traced)
            traces(traced)

        engine = Engine(
            runner, tokenizer, context_length=512, cache_bytes=cache_bytes, prefix_cache=False, on_trace=on_trace,
            **options,
        )  # fmt: skip
        longer = SamplingParams(max_new_tokens=90, ignore_eos=True)
        requests = [engine.request(prompt, longer) for prompt in PROMPTS]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
    if BACKEND == "cpu" and cache_bytes == 6 * 64 * runner.position_bytes:
        assert engine.statistics().preemptions > 0
    at = dict.fromkeys(requests, 0)
    for traced in steps:
        for request, start, ids, expert_ids, weights in traced:
            assert start == at[request]
            at[request] += len(ids)
            assert expert_ids.shape == weights.shape == (len(ids), *expert_ids.shape[1:])
    texts = {tuple(ids): ids for ids in computed(PROMPTS, requests)}
    found = {tuple(writer.trace.input_ids[w].tolist()): w for w in writer.trace.windows()}
    assert found.keys() == texts.keys()
    wanted = expected(runner, tmp_path / "alone", [texts[ids] for ids in found])
    assert_alike(writer.trace, wanted)


def test_tokens_from_the_prefix_cache_are_not_traced_again(runner, tokenizer):
    seen = {}
    engine = Engine(
        runner,
        tokenizer,
        context_length=512,
        on_trace=lambda traced: [seen.setdefault(t.request, t.start) for t in traced],
    )
    for prompt in SHARED[:2]:
        request = engine.request(prompt, params_of(0, routing=True, prompt_routing=prompt is SHARED[0]))
        engine.add(request)
        while engine.has_work:
            engine.step()
    assert list(seen.values()) == [0, 128]
    assert len(next(iter(seen)).prompt_routing) == len(SHARED[0])
