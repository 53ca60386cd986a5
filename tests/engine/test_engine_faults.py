"""Failures of one request, or unusual combinations of its settings, change nothing for the others."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import make_model
from olmoe.engine.engine import Engine
from olmoe.engine.request import Delta, Request
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.text_stream import TextStream
from olmoe.errors import UserError
from olmoe.ops.cpu import extension
from olmoe.runner import RouterPolicy, make_runner

BACKEND = "torch" if extension.unavailable() else "cpu"


@pytest.fixture(scope="module")
def runner():
    return make_runner(make_model(num_key_value_heads=2, max_position_embeddings=512), BACKEND)


def engine_of(runner, tokenizer, *, blocks: int = 64, **options) -> Engine:
    cache_bytes = blocks * 64 * runner.position_bytes
    return Engine(runner, tokenizer, context_length=512, cache_bytes=cache_bytes, **options)


def run(engine: Engine, requests: list[Request]) -> list[Delta]:
    for request in requests:
        engine.add(request)
    news = []
    while engine.has_work:
        news += engine.step()
        engine.check()
    assert engine.statistics().blocks_used == 0
    return news


class _Refusing:
    """A grammar for exactly this many tokens of one id, which fails after the third or at the start."""

    def __init__(self, token_id: int, count: int, *, at_start: bool = False, breaks: bool = True) -> None:
        self.token_id, self.count, self.at_start, self.breaks = token_id, count, at_start, breaks

    def start(self):
        if self.at_start:
            raise ValueError("no start")
        return _Refusing(self.token_id, self.count, breaks=self.breaks)

    finished = property(lambda self: self.count == 0)

    def fill(self, mask) -> None:
        mask[:] = 0
        mask[self.token_id // 32] = np.uint32(1 << self.token_id % 32).astype(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id == self.token_id
        self.count -= 1
        if self.breaks and self.count == 2:
            raise ValueError("lost")


def test_a_failing_grammar_ends_only_its_own_text(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    broken = engine.request([9], SamplingParams(max_new_tokens=20, grammar=_Refusing(31, 5)))
    other = engine.request([9], SamplingParams(max_new_tokens=8, ignore_eos=True))
    news = run(engine, [broken, other])
    assert (broken.finish_reason, broken.error) == ("error", "The text cannot continue (lost).")
    assert (other.finish_reason, len(other.token_ids)) == ("length", 8)
    tokens = [i for delta in news if delta.request is broken for i in delta.token_ids]
    assert tokens == broken.token_ids == [31] * 3


def test_a_decoding_error_ends_only_its_own_text(runner, tokenizer, monkeypatch):
    engine = engine_of(runner, tokenizer)
    broken, other = (engine.request([9], SamplingParams(max_new_tokens=8, ignore_eos=True)) for _ in range(2))
    add = TextStream.add

    def fail_once(stream: TextStream, token_id: int) -> str:
        if stream is first and len(broken.token_ids) == 3:
            raise UnicodeError("no such bytes")
        return add(stream, token_id)

    monkeypatch.setattr(TextStream, "add", fail_once)
    engine.add(broken)
    first = engine._texts[broken].stream
    run(engine, [other])
    assert (broken.finish_reason, broken.error) == ("error", "The text cannot continue (no such bytes).")
    assert (other.finish_reason, len(other.token_ids)) == ("length", 8)


def test_adding_a_request_twice_is_refused(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    request = engine.request([9], SamplingParams(max_new_tokens=3, ignore_eos=True, prompt_logprobs=0))
    engine.add(request)
    with pytest.raises(UserError, match="added before"):
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert (len(request.token_ids), len(request.prompt_logprobs)) == (3, 1)
    with pytest.raises(UserError, match="added before"):
        engine.add(request)
    broken = engine.request([9], SamplingParams(grammar=_Refusing(31, 5, at_start=True)))
    with pytest.raises(ValueError, match="no start"):
        engine.add(broken)
    assert not engine.has_work


def _mixed(engine: Engine, i: int) -> Request:
    """Requests that each combine several kinds of settings."""
    prompt = [5 + (j * (1 + i % 4)) % 90 for j in range(1 + i * 29 % 140)]
    banned = np.zeros((engine.runner.config.num_hidden_layers, engine.runner.config.num_experts), dtype=bool)
    banned[:, i % 3] = True
    params = SamplingParams(
        max_new_tokens=20 + i * 13 % 60,
        temperature=0.8 * (i % 2),
        seed=i,
        logprobs=2 if i % 3 else None,
        prompt_logprobs=1 if i % 4 == 1 else None,
        prompt_routing=i % 5 in (1, 2),
        routing=i % 3 == 1,
        ignore_eos=i % 2 == 0,
        min_tokens=i % 7,
        stop=["e", "th"] if i % 6 == 5 else (),
        include_stop=i % 4 == 3,
        grammar=_Refusing(31 + i, 12, breaks=False) if i % 8 == 7 else None,
        allowed_token_ids=range(5, 60) if i % 8 == 3 else None,
        router_policy=RouterPolicy(banned=banned) if i % 4 == 2 else None,
    )
    request = engine.request(prompt, params, priority=i % 3, cache_salt="a" * (i % 2))
    if i % 9 == 4:
        request.limit = 0
    return request


def _found(request: Request) -> tuple:
    routing = [(r.expert_ids.tolist(), r.weights.tolist()) for r in (*request.prompt_routing, *request.routing)]
    lengths = len(request.prompt_routing), len(request.routing)
    ends = request.finish_reason, request.stop, request.error
    return request.text, request.token_ids, request.logprobs, request.prompt_logprobs, lengths, routing, ends


@pytest.mark.skipif(BACKEND != "cpu", reason="torch adds in another order in batches")
@pytest.mark.parametrize("budget", [3, 65, 512])
def test_mixed_requests_under_preemption_equal_each_alone(runner, tokenizer, budget):
    alone = []
    for i in range(36):
        engine = engine_of(runner, tokenizer, prefix_cache=False)
        run(engine, [request := _mixed(engine, i)])
        alone.append(_found(request))
    engine = engine_of(runner, tokenizer, blocks=5, token_budget=budget)
    requests = [_mixed(engine, i) for i in range(36)]
    news = run(engine, requests)
    assert engine.statistics().preemptions > 0
    for i, request in enumerate(requests):
        assert _found(request) == alone[i], i
        own = [delta for delta in news if delta.request is request]
        assert "".join(delta.text for delta in own) == request.text
        assert len([delta for delta in own if delta.finish_reason]) == 1


def test_aborting_the_sample_that_computes_the_prompt_does_not_stop_its_siblings(runner, tokenizer):
    engine = engine_of(runner, tokenizer, token_budget=64)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    siblings = [engine.request([7 + j % 50 for j in range(300)], params) for _ in range(4)]
    for request in siblings:
        engine.add(request)
    for request in siblings[:3]:  # each one is the first in its turn
        engine.step()
        engine.step()
        engine.abort(request)
        engine.check()
    while engine.has_work:
        engine.step()
    assert [r.finish_reason for r in siblings] == ["cancelled"] * 3 + ["length"]
    assert siblings[3].cached_tokens == 256
