"""The definition of sampling: random numbers, distributions, and each parameter's effect worked out by hand."""

from __future__ import annotations

from array import array

import pytest
import torch

from olmoe import ops
from olmoe.ops import SamplingRow, SamplingStatus, cpu
from olmoe.ops.sampling import biased, filtered, masked, penalized, philox, uniform


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    if request.param == "cpu" and not cpu.available():
        pytest.skip(f"{cpu.unavailable()}")
    return request.param


def test_random_numbers_are_philox():
    """Known-answer tests published by its authors (Random123, philox4x32 with 10 rounds)."""
    ones = 2**32 - 1
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_random_numbers_depend_on_seed_and_position():
    assert uniform(0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53
    numbers = [uniform(seed, position) for seed in (0, 1, 2**32, 2**63 - 1) for position in (0, 1, 2**32)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)


PARAMETERS = {
    "temperature": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    "biased": {"bias_ids": array("q", [3, 4]), "biases": array("d", [2.0, -torch.inf])},
    "masked": {"mask": torch.tensor([0b1011_0111_0110], dtype=torch.int32)},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_many_draws_pass_a_chi_square_test_against_the_definition(name, backend):
    """20,000 draws, one per position; one in 100,000 correct samplers would exceed the limit."""
    count, chunk, v = 20_000 if backend == "cpu" else 2_000, 500, 12  # the definition is slow
    logits = torch.randn(v, generator=torch.Generator().manual_seed(8))
    row = SamplingRow(**({"temperature": 1.0, "ids": array("q", [0, 5, 5]), "prompt_length": 1} | PARAMETERS[name]))
    scores = filtered(masked(biased(penalized(logits, row), row), row), row)
    expected, seen = count * scores.double().softmax(-1), torch.zeros(v)
    for first in range(0, count, chunk):
        rows = [SamplingRow(**{**vars(row), "seed": 77, "position": first + p}) for p in range(chunk)]
        seen += ops.sample(logits.expand(chunk, v), rows, v, backend=backend).ids.bincount(minlength=v)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    statistic = float(((seen - expected)[possible] ** 2 / expected[possible]).sum())
    degrees = int(possible.sum()) - 1
    # Wilson and Hilferty's approximation of the quantile, 4.26 deviations out.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.26 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < limit
    assert degrees >= 2


def test_greedy_breaks_ties_by_the_lower_id(backend):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0], [-0.0, 0.0, -1.0, -0.0], [5.0] * 4])
    assert ops.sample(logits, [SamplingRow()] * 3, 4, backend=backend).ids.tolist() == [1, 0, 0]


def kept(row: SamplingRow, logits: torch.Tensor, backend: str) -> set[int]:
    """The tokens that a row can choose, found by many draws at once."""
    rows = [SamplingRow(**{**vars(row), "seed": 1, "position": p}) for p in range(400)]
    return set(ops.sample(logits.expand(400, -1), rows, len(logits), backend=backend).ids.tolist())


def test_ties_at_the_edge_of_each_filter(backend):
    logits = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    assert kept(SamplingRow(temperature=1.0, top_k=1), logits, backend) == {1, 2, 4}  # all tied with the last one stay
    assert kept(SamplingRow(temperature=1.0, top_k=4), logits, backend) == {0, 1, 2, 3, 4, 5}
    assert kept(SamplingRow(temperature=1.0, min_p=1.0), logits, backend) == {1, 2, 4}
    assert kept(SamplingRow(temperature=1.0, top_p=1e-9), logits, backend) == {1}  # the lower id comes first
    same = torch.zeros(10)
    assert kept(SamplingRow(temperature=1.0, top_p=0.5), same, backend) == {0, 1, 2, 3, 4}
    assert kept(SamplingRow(temperature=1.0, top_p=0.51), same, backend) == {0, 1, 2, 3, 4, 5}
    assert kept(SamplingRow(temperature=1.0, top_k=3, top_p=0.5), same, backend) == {0, 1, 2, 3, 4}


def test_a_row_without_choices_is_reported_and_others_continue(backend):
    logits = torch.zeros(5, 40)
    logits[1, 3], logits[2, 39] = torch.nan, torch.inf
    nothing, padding_only = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1 << 7], dtype=torch.int32)
    banned = SamplingRow(bias_ids=array("q", range(39)), biases=array("d", [-torch.inf] * 39))
    rows = [SamplingRow(mask=nothing, logprobs=2), SamplingRow(logprobs=2), SamplingRow(), banned]
    rows.append(SamplingRow(mask=padding_only, temperature=1.0))
    samples = ops.sample(logits, rows, 39, backend=backend)
    assert [SamplingStatus(s).name for s in samples.status.tolist()] == [
        "NOTHING_ALLOWED", "NOT_FINITE", "CHOSEN", "NOTHING_ALLOWED", "NOTHING_ALLOWED"
    ]  # fmt: skip
    assert samples.ids.tolist() == [-1, -1, 0, -1, -1]  # the infinity is padding
    assert samples.logprobs.isnan().all()
    assert (samples.top_ids == -1).all()


def test_a_single_allowed_token_is_chosen_whatever_the_filters(backend):
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, dtype=torch.int32)
    mask[2] = 1 << 1
    rows = [SamplingRow(temperature=t, top_k=3, top_p=0.1, min_p=0.9, mask=mask) for t in (0.0, 1.0, 1e30)]
    assert ops.sample(logits, rows, 70, backend=backend).ids.tolist() == [65, 65, 65]


def test_log_probabilities_are_those_of_the_unmodified_logits(backend):
    logits = 5 * torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    logits[1] = 2.0  # ties: the lower ids come first
    rows = [SamplingRow(logprobs=20, temperature=0.3, top_k=2), SamplingRow(logprobs=3), SamplingRow(logprobs=0)]
    samples = ops.sample(logits, rows, 290, backend=backend)
    expected = logits[:, :290].log_softmax(-1)
    chosen = expected.gather(1, samples.ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(samples.logprobs, chosen, rtol=1e-6, atol=1e-6)
    top = expected[0].topk(20)
    assert samples.top_ids.shape == (3, 20)
    assert torch.equal(samples.top_ids[0], top.indices)
    torch.testing.assert_close(samples.top_logprobs[0], top.values, rtol=1e-6, atol=1e-6)
    assert samples.top_ids[1].tolist() == [0, 1, 2] + [-1] * 17
    assert samples.top_logprobs[1, 3:].isnan().all()
    assert (samples.top_ids[2] == -1).all()


def test_more_log_probabilities_than_tokens(backend):
    samples = ops.sample(torch.tensor([[1.0, 2.0, 9.0]]), [SamplingRow(logprobs=20)], 2, backend=backend)
    assert samples.top_ids.tolist() == [[1, 0]]
