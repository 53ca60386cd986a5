"""The engine: concurrent requests give what each gives alone, whatever happens on the way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from conftest import make_model
from olmoe.config import RopeParameters
from olmoe.engine.engine import Engine
from olmoe.engine.request import Delta, Request
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.ops.cpu import extension
from olmoe.runner import Batch, CacheView, RouterPolicy, Want, make_runner

BACKEND = "torch" if extension.unavailable() else "cpu"
PROMPTS = [[5 + (i * 7 + j * 3) % 200 for j in range(1 + i * 37 % 150)] for i in range(12)]


@pytest.fixture(scope="module")
def runner():
    return make_runner(make_model(num_key_value_heads=2, max_position_embeddings=512), BACKEND)


def engine_of(runner, tokenizer, *, blocks: int = 64, **options) -> Engine:
    cache_bytes = blocks * 64 * runner.position_bytes
    return Engine(runner, tokenizer, context_length=512, cache_bytes=cache_bytes, **options)


def run(engine: Engine, requests: list[Request], *, check: bool = True) -> list[Delta]:
    for request in requests:
        engine.add(request)
    news = []
    while engine.has_work:
        news += engine.step()
        if check:
            engine.check()
    assert engine.statistics().blocks_used == 0
    return news


def params_of(i: int, **others) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=3 + i % 20, temperature=0.9 * (i % 2), seed=i, logprobs=2, ignore_eos=True, **others
    )


def texts(runner, tokenizer, prompts=PROMPTS, **options) -> list:
    engine = engine_of(runner, tokenizer, **options)
    requests = [engine.request(prompt, params_of(i)) for i, prompt in enumerate(prompts)]
    run(engine, requests)
    return [(r.token_ids, r.text, r.logprobs, r.finish_reason) for r in requests]


@pytest.fixture(scope="module")
def alone(runner, tokenizer):
    found = []
    for i, prompt in enumerate(PROMPTS):
        engine = engine_of(runner, tokenizer, prefix_cache=False)
        request = engine.request(prompt, params_of(i))
        run(engine, [request])
        found.append((request.token_ids, request.text, request.logprobs, request.finish_reason))
    return found


@pytest.mark.skipif(BACKEND != "cpu", reason="torch adds in another order in batches")
class TestSameBits:
    @pytest.mark.parametrize("budget", [1, 63, 64, 65, 512])
    @pytest.mark.parametrize("prefix_cache", [False, True])
    def test_batching_with_any_chunk_size(self, runner, tokenizer, alone, budget, prefix_cache):
        assert texts(runner, tokenizer, token_budget=budget, prefix_cache=prefix_cache) == alone

    def test_constant_preemption(self, runner, tokenizer, alone):
        engine = engine_of(runner, tokenizer, blocks=6)
        requests = [engine.request(prompt, params_of(i)) for i, prompt in enumerate(PROMPTS)]
        run(engine, requests)
        assert [(r.token_ids, r.text, r.logprobs, r.finish_reason) for r in requests] == alone
        longer = [engine.request([9] * 60, SamplingParams(max_new_tokens=100, ignore_eos=True)) for _ in range(6)]
        run(engine, longer)
        assert engine.statistics().preemptions > 0
        assert len({tuple(r.token_ids) for r in longer}) == 1

    def test_cached_prefixes(self, runner, tokenizer):
        prefix = [7 + j % 50 for j in range(200)]
        prompts = [[*prefix, *range(5, 5 + i)] for i in range(1, 9)]
        with_cache, without = engine_of(runner, tokenizer), engine_of(runner, tokenizer, prefix_cache=False)
        found = []
        for engine in (with_cache, without):
            requests = [engine.request(prompt, params_of(i)) for i, prompt in enumerate(prompts)]
            for request in requests:  # one after the other
                run(engine, [request])
            found.append([(r.token_ids, r.logprobs) for r in requests])
        assert found[0] == found[1]
        assert [r.cached_tokens for r in requests] == [0] * 8
        assert with_cache.statistics().prefix_hits == 7 * 192

    def test_garbage_in_free_blocks(self, runner, tokenizer, alone):
        engine = engine_of(runner, tokenizer, blocks=12)
        for _ in range(2):
            for tensor in (*engine._cache.keys, *engine._cache.values):
                tensor.fill_(torch.nan)
            engine.forget_prefixes()
            requests = [engine.request(prompt, params_of(i)) for i, prompt in enumerate(PROMPTS)]
            run(engine, requests)
            assert [(r.token_ids, r.text, r.logprobs, r.finish_reason) for r in requests] == alone


def test_several_samples_share_the_computation_of_their_prompt(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    prompt = [7 + j % 50 for j in range(300)]
    run(engine, [engine.request(prompt, params_of(i)) for i in range(6)])
    statistics = engine.statistics()
    assert statistics.prompt_tokens == 300 + 5 * (300 - 256)
    assert statistics.prefix_hits == 5 * 256


@pytest.mark.parametrize(
    "other",
    [
        {"cache_salt": "b"},
        {"params": SamplingParams(router_policy=RouterPolicy(top_k=1))},
        {"params": SamplingParams(router_policy={"pin": [{"expert": 0}]})},
        {"params": SamplingParams(router_policy={"temperature": 0.5})},
    ],
    ids=["salt", "k", "pin", "temperature"],
)
def test_requests_that_must_not_share_a_prefix_do_not(runner, tokenizer, other):
    engine, prompt = engine_of(runner, tokenizer), [7] * 200
    first = {"params": SamplingParams(max_new_tokens=2), "cache_salt": "a"}
    for options in (first, first | other, first):
        run(engine, [request := engine.request(prompt, **options)])
    assert request.cached_tokens == 192
    assert engine.statistics().prefix_hits == 192


def test_deltas_concatenate_to_the_text(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    requests = [engine.request(prompt, params_of(i)) for i, prompt in enumerate(PROMPTS)]
    news = run(engine, requests)
    for request in requests:
        own = [delta for delta in news if delta.request is request]
        assert "".join(delta.text for delta in own) == request.text
        assert list(itertools.chain(*(delta.token_ids for delta in own))) == request.token_ids
        assert list(itertools.chain(*(delta.logprobs for delta in own))) == request.logprobs
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + ["length"]


def test_requests_are_ordered_by_priority_then_arrival(runner, tokenizer):
    engine = engine_of(runner, tokenizer, max_rows=1)
    one = SamplingParams(max_new_tokens=1)
    requests = [engine.request([9], one, priority=p) for p in (1, 0, 1, -5)]
    order = [requests.index(delta.request) for delta in run(engine, requests)]
    assert order == [3, 1, 0, 2]


def test_aborting_frees_blocks_immediately(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    running, waiting = (engine.request([9] * 100, SamplingParams(max_new_tokens=50, ignore_eos=True)) for _ in range(2))
    engine.add(running)
    engine.step()
    engine.add(waiting)
    engine.abort(running)
    engine.abort(waiting)
    engine.abort(waiting)
    assert engine.statistics().blocks_used == 0
    assert [(d.request, d.finish_reason) for d in engine.step()] == [(running, "cancelled"), (waiting, "cancelled")]
    assert not engine.has_work


def test_requests_that_can_never_fit_are_refused(runner, tokenizer):
    engine = engine_of(runner, tokenizer, blocks=2)
    with pytest.raises(
        UserError, match=r"^The prompt's 100 tokens and 29 new ones need more than the cache of 128 tok"
    ):
        engine.request([9] * 100, SamplingParams(max_new_tokens=29))
    run(engine, [engine.request([9] * 100, SamplingParams(max_new_tokens=28, ignore_eos=True))])
    with pytest.raises(UserError, match="has no room for 64 tokens"):
        Engine(runner, tokenizer, context_length=512, cache_bytes=1)


def test_prompt_log_probabilities_are_returned(runner, tokenizer):
    reference = make_runner(make_model(num_key_value_heads=2, max_position_embeddings=512), "reference")
    for budget in (512, 64, 7):
        engine = engine_of(runner, tokenizer, token_budget=budget)
        score = SamplingParams(max_new_tokens=1, prompt_logprobs=3)
        requests = [engine.request(prompt, score) for prompt in PROMPTS]
        run(engine, requests)
        for prompt, request in zip(PROMPTS, requests, strict=True):
            view = CacheView(reference.new_cache(1, len(prompt)), np.zeros((1, 1), dtype=np.int32))
            batch = Batch(prompt, [len(prompt)], [0])
            logits = reference.forward(batch, view, Want(range(len(prompt)))).logits[:, : tokenizer.vocab_size]
            expected = logits.double().log_softmax(-1)
            assert request.prompt_logprobs[0] is None
            assert len(request.prompt_logprobs) == len(prompt)
            for i, entry in enumerate(request.prompt_logprobs[1:], start=1):
                assert entry.token_id == prompt[i]
                assert entry.logprob == pytest.approx(float(expected[i - 1, prompt[i]]), abs=1e-4)
                assert list(entry.top) == expected[i - 1].topk(3).indices.tolist()


def test_a_limit_of_0_scores_the_prompt_only(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    request = engine.request(PROMPTS[3], SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    request.limit = 0
    (delta,) = run(engine, [request])
    assert (delta.finish_reason, delta.token_ids, request.token_ids) == ("length", [], [])
    assert len(request.prompt_logprobs) == len(PROMPTS[3])


@pytest.mark.parametrize("budget", [512, 7])
def test_routing_covers_prompt_and_text(runner, tokenizer, budget):
    engine, prompt = engine_of(runner, tokenizer, token_budget=budget), PROMPTS[3]
    request = engine.request(
        prompt, SamplingParams(max_new_tokens=5, routing=True, prompt_routing=True, ignore_eos=True)
    )
    run(engine, [request])
    assert (len(request.prompt_routing), len(request.routing)) == (len(prompt), 5)
    whole = [*prompt, *request.token_ids[:-1]]
    again = engine.request(whole, SamplingParams(max_new_tokens=1, prompt_routing=True))
    run(engine, [again])
    found = [*request.prompt_routing, *request.routing[1:]]
    np.testing.assert_array_equal(request.routing[0].expert_ids, request.prompt_routing[-1].expert_ids)
    for one, other in zip(found, again.prompt_routing, strict=True):
        np.testing.assert_array_equal(one.expert_ids, other.expert_ids)
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-5)


def test_a_policy_bans_experts(runner, tokenizer):
    config = runner.config
    banned = np.zeros((config.num_hidden_layers, config.num_experts), dtype=bool)
    banned[:, 0] = True
    engine = engine_of(runner, tokenizer)
    params = SamplingParams(max_new_tokens=8, routing=True, router_policy=RouterPolicy(banned=banned), ignore_eos=True)
    plain = SamplingParams(max_new_tokens=8, routing=True, ignore_eos=True)
    requests = [engine.request([9, 8, 7], each) for each in (params, plain)]
    run(engine, requests)
    assert all((routed.expert_ids != 0).all() for routed in requests[0].routing)
    assert any((routed.expert_ids == 0).any() for routed in requests[1].routing)


class TestEnds:
    def test_stop_ids(self, runner, tokenizer):
        engine = engine_of(runner, tokenizer)
        run(engine, [free := engine.request([9], SamplingParams(max_new_tokens=20, ignore_eos=True))])
        stop = free.token_ids[5]
        params = SamplingParams(max_new_tokens=20, ignore_eos=True, stop_token_ids=[stop])
        run(engine, [request := engine.request([9], params)])
        expected = free.token_ids[: free.token_ids.index(stop) + 1]
        assert (request.finish_reason, request.stop, request.token_ids) == ("stop", stop, expected)
        assert request.text == tokenizer.decode(expected[:-1])

    def test_nothing_ends_before_min_tokens(self, runner, tokenizer):
        engine = engine_of(runner, tokenizer)
        wanted = dict.fromkeys(tokenizer.eos_ids, 50.0) | {11: 40.0}
        for count in (0, 1, 4):
            params = SamplingParams(max_new_tokens=20, logit_bias=wanted, min_tokens=count)
            run(engine, [request := engine.request([9], params)])
            assert request.finish_reason == "eos"
            assert len(request.token_ids) == count + 1

    def test_allowed_ids_restrict_generation(self, runner, tokenizer):
        engine = engine_of(runner, tokenizer)
        params = SamplingParams(max_new_tokens=40, temperature=2.0, allowed_token_ids=[11, 40, 99], ignore_eos=True)
        run(engine, [request := engine.request([9], params)])
        assert set(request.token_ids) == {11, 40, 99}

    def test_stop_strings_can_be_included(self, runner, tokenizer):
        engine = engine_of(runner, tokenizer)
        run(engine, [free := engine.request([9], SamplingParams(max_new_tokens=20, ignore_eos=True))])
        stop = free.text[4:8]
        for include in (False, True):
            params = SamplingParams(max_new_tokens=20, ignore_eos=True, stop=[stop], include_stop=include)
            run(engine, [request := engine.request([9], params)])
            assert request.stop == stop
            end = free.text.index(stop) + len(stop) * include
            assert request.text == free.text[:end]


class _Letters:
    """A grammar for exactly this many tokens of one id."""

    def __init__(self, token_id: int, count: int, *, broken: bool = False) -> None:
        self.token_id, self.count, self.broken = token_id, count, broken

    def start(self):
        return _Letters(self.token_id, self.count, broken=self.broken)

    finished = property(lambda self: self.count == 0)

    def fill(self, mask) -> None:
        if self.broken:
            raise ValueError("no such state")
        mask[:] = 0
        mask[self.token_id // 32] = np.uint32(1 << self.token_id % 32).astype(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id == self.token_id
        self.count -= 1


def test_grammars_are_followed(runner, tokenizer):
    engine = engine_of(runner, tokenizer)
    params = [SamplingParams(max_new_tokens=20, temperature=1.0, grammar=_Letters(i, 5)) for i in (31, 32, 99)]
    params.append(SamplingParams(max_new_tokens=6, ignore_eos=True))
    params.append(SamplingParams(grammar=_Letters(5, 5, broken=True)))
    requests = [engine.request([9], each) for each in params]
    run(engine, requests)
    assert [r.token_ids for r in requests[:3]] == [[31] * 5, [32] * 5, [99] * 5]
    assert [r.finish_reason for r in requests] == ["stop"] * 3 + ["length", "error"]
    assert requests[4].error == "The grammar cannot continue (no such state)."


def test_dynamic_rope_gives_the_same_text_under_preemption(tokenizer):
    rope = RopeParameters(rope_type="dynamic", factor=8.0)
    runner = make_runner(make_model(num_key_value_heads=2, max_position_embeddings=64, rope=rope), BACKEND)
    params = SamplingParams(max_new_tokens=120, ignore_eos=True)
    found = []
    for blocks in (64, 7):
        engine = engine_of(runner, tokenizer, blocks=blocks)
        requests = [engine.request([5 + i] * 100, params) for i in range(3)]
        run(engine, requests)
        found.append([r.token_ids for r in requests])
        assert (engine.statistics().preemptions > 0) == (blocks == 7)
        assert engine.statistics().prefix_hits == 0
    assert found[0] == found[1]
