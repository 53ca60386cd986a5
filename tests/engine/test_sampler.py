"""Sampling against transformers' own logits processors, and tokens that must never be chosen."""

from __future__ import annotations

import re
from array import array
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from olmoe.engine.request import Request
from olmoe.engine.sampler import Choice, Sampler
from olmoe.engine.sampling_params import SamplingParams
from olmoe.ops import AUTO, SamplingRow
from olmoe.ops.sampling import filtered, penalized

V = 97


@pytest.fixture(params=[AUTO, "reference"])
def backend(request):
    """The kernels, if installed, and the definition."""
    return request.param


def request_of(params: SamplingParams, history: list[int], text: list[int] | None = None) -> Request:
    return Request(history, params, limit=1000, token_ids=text or [])


def choose(params: SamplingParams, allowed: int, logits: Tensor, history: list[int], backend: str = AUTO) -> Choice:
    return Sampler(allowed, backend).choose_rows(logits[None], [request_of(params, history)])[0]


def row_of(params: SamplingParams) -> SamplingRow:
    return SamplingRow(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)


def penalize(scores: Tensor, history: list[int], penalty: float) -> Tensor:
    return penalized(scores, SamplingRow(repetition_penalty=penalty, ids=array("q", history)))


def random_logits(seed: int, spread: float = 3.0, size: int = V) -> Tensor:
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def transformers_scores(scores: Tensor, params: SamplingParams) -> Tensor:
    """The warpers that transformers' `generate` would apply, in its order."""
    warpers = [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1.0 else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    batch = scores.clone()[None]
    for warper in warpers:
        batch = warper(None, batch)
    return batch[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"temperature": t} for t in (0.1, 0.7, 1.3, 5.0)),
        *({"top_k": k} for k in (1, 2, 10, V - 1, V, V + 5)),
        *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
        *({"min_p": p} for p in (1e-6, 0.02, 0.3, 1.0)),
        {"top_k": 5, "top_p": 0.6},
        {"top_p": 0.8, "min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.7, "min_p": 0.05},
    ],
    ids=str,
)
def test_filters_agree_with_transformers(changes):
    params = SamplingParams(**({"temperature": 1.0} | changes))
    removed = 0
    for seed in range(40):
        scores = random_logits(seed, spread=1.0 + seed % 4)
        ours, theirs = filtered(scores, row_of(params)), transformers_scores(scores, params)
        assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=2e-5, atol=1e-7)
        removed += int((ours == -torch.inf).sum())
    filters = any(name != "temperature" for name in changes) and changes.get("top_k", 0) < V
    assert (removed > 0) == filters


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_penalty_agrees_with_transformers(penalty):
    history = [3, 3, 50, 96, 0, 7]
    for seed in range(10):
        ours = random_logits(seed)
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), ours.clone()[None])[0]
        torch.testing.assert_close(penalize(ours, history, penalty), theirs, rtol=1e-6, atol=0)


def test_the_penalty_lowers_logits_of_both_signs_and_no_others():
    scores = torch.tensor([2.0, -2.0, 1.0, 0.0])
    scores = penalize(scores, [0, 1, 3, 99, -1], 2.0)  # ids beyond the scores (padding of the prompt) are no error
    assert scores.tolist() == [1.0, -4.0, 1.0, 0.0]
    assert penalize(scores, [], 2.0).tolist() == [1.0, -4.0, 1.0, 0.0]


def test_at_least_one_token_survives_the_strictest_filters():
    harshest = [
        SamplingParams(temperature=1e-3, top_k=1, top_p=1e-9, min_p=1.0),
        SamplingParams(temperature=1.0, top_p=5e-324),  # which is 0 in fp32
    ]
    for params in harshest:
        for scores in (random_logits(0), torch.zeros(V), torch.full((V,), -1e30), torch.full((V,), 1e30)):
            kept = filtered(scores, row_of(params)) > -torch.inf
            assert kept.any()
            assert kept[scores == scores.max()].any()


@pytest.mark.parametrize("temperature", [1e-45, 5e-324, 1e-30, 1e30, 1e308])
def test_extreme_temperatures_stay_finite(temperature, backend):
    params = SamplingParams(temperature=temperature, seed=0)
    for scores in (random_logits(0), 1e38 * random_logits(1, spread=1.0), -1e38 * random_logits(2, spread=1.0).abs()):
        chosen = choose(params, V, scores, [], backend).token_id
        assert 0 <= chosen < V
        if temperature < 1:
            assert chosen == int(scores.argmax())


@pytest.mark.parametrize("penalty", [1e-300, 1e-45, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_penalties_stay_finite(penalty, temperature, backend):
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=0)
    assert 0 <= choose(params, V, random_logits(0), list(range(V)), backend).token_id < V


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=0),
        SamplingParams(temperature=100.0, seed=0),
        SamplingParams(temperature=1.0, top_k=V, seed=0),
        SamplingParams(temperature=1.0, top_p=0.99, min_p=0.01, seed=0),
        SamplingParams(repetition_penalty=1.5),
    ],
    ids=repr,
)
def test_padding_rows_are_never_chosen_however_large_their_logits(params, backend):
    allowed = 60
    sampler, request = Sampler(allowed, backend), request_of(params, [1, 2, V - 1])
    for seed, huge in enumerate([10.0, 1e4, 1e38, float("inf"), float("nan")] * 20):
        logits = random_logits(seed)
        logits[allowed:] = huge
        (choice,) = sampler.choose_rows(logits[None], [request])
        assert 0 <= choice.token_id < allowed
        request.token_ids.append(choice.token_id)


def test_greedy_takes_the_largest_logit_and_does_not_modify_them(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = random_logits(5).to(dtype)
        before = logits.clone()
        chosen = choose(SamplingParams(repetition_penalty=1.0001), V, logits, [4], backend)
        assert chosen.token_id == int(logits.argmax())
        assert torch.equal(logits, before)


def test_the_penalty_changes_the_greedy_choice():
    logits = torch.tensor([1.0, 0.9, 0.1])
    assert choose(SamplingParams(repetition_penalty=1.5), 3, logits, [0]).token_id == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nonfinite_logits_are_reported_in_one_sentence(bad, temperature, backend):
    logits = random_logits(0)
    logits[7] = bad
    choice = choose(SamplingParams(temperature=temperature), V, logits, [], backend)
    assert choice.token_id == -1
    assert re.fullmatch("The model's logits are not finite: .* float32.", choice.error)


def draws(params: SamplingParams, count: int, logits: Tensor) -> list[int]:
    sampler, request = Sampler(len(logits)), request_of(params, [])
    for _ in range(count):
        request.token_ids.append(sampler.choose_rows(logits[None], [request])[0].token_id)
    return request.token_ids


def test_equal_seeds_draw_equally_and_other_or_missing_seeds_differ():
    logits = random_logits(0)
    first = draws(SamplingParams(temperature=1.0, seed=11), 30, logits)
    torch.manual_seed(999)  # torch's global generator is not involved
    assert draws(SamplingParams(temperature=1.0, seed=11), 30, logits) == first
    assert draws(SamplingParams(temperature=1.0, seed=12), 30, logits) != first
    unseeded = [draws(SamplingParams(temperature=1.0), 30, logits) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_many_draws_have_the_filtered_distribution(changes):
    count = 6000
    params = SamplingParams(**({"temperature": 1.0, "seed": 3} | changes))
    logits = random_logits(8, spread=1.0, size=12)
    expected = transformers_scores(logits, params).softmax(-1)
    seen = Counter(draws(params, count, logits))
    for i, probability in enumerate(expected.tolist()):
        deviation = (count * probability * (1 - probability)) ** 0.5
        assert abs(seen[i] - count * probability) <= 4.5 * deviation
        if probability == 0:
            assert seen[i] == 0


def test_a_request_samples_the_same_in_any_batch_and_order():
    logits = torch.stack([random_logits(n, spread=0.5) for n in range(4)])
    params = [
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=5, logprobs=3),
        SamplingParams(temperature=0.7, top_k=9, frequency_penalty=0.5, logit_bias={4: 2.0}, seed=6),
    ]

    def run(rounds: list[list[int]]) -> list[list[int]]:
        sampler, requests = Sampler(V), [request_of(p, [n]) for n, p in enumerate(params)]
        for members in rounds:
            choices = sampler.choose_rows(logits[members], [requests[n] for n in members])
            for n, choice in zip(members, choices, strict=True):
                requests[n].token_ids.append(choice.token_id)
        return [request.token_ids for request in requests]

    alone = run([[n] for n in range(4) for _ in range(12)])
    assert run([[0, 1, 2, 3]] * 12) == alone
    assert run([[3, 1, 0]] * 6 + [[2]] * 5 + [[0, 2]] + [[1, 2, 3, 0]] * 5 + [[3, 2, 1]] + [[]]) == alone


def test_a_new_sampler_continues_a_request_identically():
    logits, params = random_logits(0), SamplingParams(temperature=1.0, frequency_penalty=1.0, seed=8)
    whole = draws(params, 20, logits)
    resumed = request_of(params, [], whole[:7])
    (choice,) = Sampler(V).choose_rows(logits[None], [resumed])
    assert choice.token_id == whole[7]


def test_presence_and_frequency_count_the_text_but_repetition_also_the_prompt():
    logits = torch.tensor([2.0, 1.9, 1.8, 1.0])
    params = SamplingParams(presence_penalty=0.15)
    assert choose(params, 4, logits, [0]).token_id == 0  # occurs only in the prompt
    sampler, request = Sampler(4), request_of(params, [0])
    said = []
    for _ in range(3):
        request.token_ids.append(sampler.choose_rows(logits[None], [request])[0].token_id)
        said.append(request.token_ids[-1])
    assert said == [0, 1, 0]  # 2.0; 1.9 against 1.85; 1.85 against 1.75 and 1.8
    request = request_of(SamplingParams(frequency_penalty=0.15), [0], [0, 0])
    assert sampler.choose_rows(logits[None], [request])[0].token_id == 1


def test_biases_move_single_tokens_and_ban_them():
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert choose(SamplingParams(logit_bias={2: 3.0}), 3, logits, []).token_id == 2
    assert choose(SamplingParams(logit_bias={0: -float("inf")}), 3, logits, []).token_id == 1


def test_masked_tokens_are_never_chosen_and_a_request_without_choices_fails_alone():
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(3, 1)
    requests = [request_of(SamplingParams(), []) for _ in range(3)]
    masks = [torch.tensor([word], dtype=torch.int32) for word in (0b110, 0b1000)]
    first, second, third = Sampler(3).choose_rows(logits, requests, [*masks, None])
    assert (first.token_id, third.token_id) == (1, 0)
    assert re.fullmatch("No token is left to choose: .*.", second.error)


def test_log_probabilities_are_the_models_own():
    logits = random_logits(3)
    params = SamplingParams(temperature=0.5, top_k=2, logit_bias={1: 5.0}, repetition_penalty=1.3, seed=1, logprobs=4)
    choice = choose(params, V, logits, [1, 2])
    expected = logits.log_softmax(-1)
    assert choice.logprob == pytest.approx(float(expected[choice.token_id]), abs=1e-6)
    assert list(choice.top) == expected.topk(4).indices.tolist()
    assert list(choice.top.values()) == pytest.approx(expected.topk(4).values.tolist(), abs=1e-6)
    assert choose(SamplingParams(logprobs=0), V, logits, []).top == {}
    assert choose(SamplingParams(), V, logits, []).logprob is None
