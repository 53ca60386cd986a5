"""Sampling against transformers' own logits processors, and what must never be chosen."""

from __future__ import annotations

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

from olmoe.engine.request import SamplingParams
from olmoe.engine.sampler import Sampler, filtered, penalize
from olmoe.errors import UserError

V = 97


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
        ours, theirs = filtered(scores, params), transformers_scores(scores, params)
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
        penalize(ours, history, penalty)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_the_penalty_lowers_both_signs_and_leaves_others_alone():
    scores = torch.tensor([2.0, -2.0, 1.0, 0.0])
    penalize(scores, [0, 1, 3, 99, -1], 2.0)  # ids beyond the scores (padding rows of the prompt) are no error
    assert scores.tolist() == [1.0, -4.0, 1.0, 0.0]
    penalize(scores, [], 2.0)
    assert scores.tolist() == [1.0, -4.0, 1.0, 0.0]


def test_at_least_one_token_survives_the_harshest_filters():
    harshest = [
        SamplingParams(temperature=1e-3, top_k=1, top_p=1e-9, min_p=1.0),
        SamplingParams(temperature=1.0, top_p=5e-324),  # which is 0 in fp32
    ]
    for params in harshest:
        for scores in (random_logits(0), torch.zeros(V), torch.full((V,), -1e30), torch.full((V,), 1e30)):
            kept = filtered(scores, params) > -torch.inf
            assert kept.any()
            assert kept[scores == scores.max()].any()


@pytest.mark.parametrize("temperature", [1e-45, 5e-324, 1e-30, 1e30, 1e308])
def test_extreme_temperatures_stay_finite(temperature):
    params = SamplingParams(temperature=temperature, seed=0)
    for scores in (random_logits(0), 1e38 * random_logits(1, spread=1.0), -1e38 * random_logits(2, spread=1.0).abs()):
        chosen = Sampler(params, V).choose(scores, [])
        assert 0 <= chosen < V
        if temperature < 1:
            assert chosen == int(scores.argmax())


@pytest.mark.parametrize("penalty", [1e-300, 1e-45, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extreme_penalties_stay_finite(penalty, temperature):
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=0)
    assert 0 <= Sampler(params, V).choose(random_logits(0), list(range(V))) < V


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
def test_padding_rows_are_never_chosen_however_large_their_logits(params):
    allowed = 60
    sampler = Sampler(params, allowed)
    for seed, huge in enumerate([10.0, 1e4, 1e38, float("inf"), float("nan")] * 20):
        logits = random_logits(seed)
        logits[allowed:] = huge
        assert sampler.choose(logits, [1, 2, V - 1]) < allowed


def test_greedy_takes_the_largest_and_leaves_the_logits_as_they_were():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = random_logits(5).to(dtype)
        before = logits.clone()
        assert Sampler(SamplingParams(repetition_penalty=1.0001), V).choose(logits, [4]) == int(logits.argmax())
        assert torch.equal(logits, before)


def test_the_penalty_changes_the_greedy_choice():
    logits = torch.tensor([1.0, 0.9, 0.1])
    assert Sampler(SamplingParams(repetition_penalty=1.5), 3).choose(logits, [0]) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_sentence(bad, temperature):
    logits = random_logits(0)
    logits[7] = bad
    with pytest.raises(UserError, match="^The model's logits are not finite: .* float32.$"):
        Sampler(SamplingParams(temperature=temperature), V).choose(logits, [])


def draws(params: SamplingParams, count: int, logits: Tensor) -> list[int]:
    sampler = Sampler(params, len(logits))
    return [sampler.choose(logits, []) for _ in range(count)]


def test_the_same_seed_draws_the_same_and_another_seed_or_none_does_not():
    logits = random_logits(0)
    first = draws(SamplingParams(temperature=1.0, seed=11), 30, logits)
    torch.manual_seed(999)  # torch's global generator has no part in it
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
