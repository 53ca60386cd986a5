"""The kernels' sampling against its definition: the same tokens for every instruction set and mix of parameters."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from olmoe import ops
from olmoe.ops import SamplingRow
from olmoe.ops.sampling import biased, filtered, masked, penalized, uniform


def some_logits(r: random.Random, generator: torch.Generator, b: int, v: int) -> torch.Tensor:
    """Flat, peaked, equal, tied or descending: easy and hard cases for selection."""
    logits = r.choice([0.0, 1e-6, 0.1, 1.0, 3.0, 30.0, 1e30]) * torch.randn(b, v, generator=generator)
    if r.random() < 0.3:
        logits = logits.round()
    return logits.sort(descending=r.random() < 0.5).values if r.random() < 0.2 else logits


def some_row(r: random.Random, generator: torch.Generator, v: int, allowed: int) -> SamplingRow:
    length = r.choice([0, 3, 60])
    bias_ids = r.sample(range(v), min(r.choice([0, 0, 3]), v))  # padding too
    words = torch.randint(-(2**31), 2**31 - 1, (-(-allowed // 32),), generator=generator).int()
    return SamplingRow(
        temperature=r.choice([0.0, 1e-45, 0.1, 0.7, 1.0, 2.0, 1e30]),
        top_k=r.choice([0, 0, 1, 5, 40, v // 2, v, 10**9]),
        top_p=r.choice([1.0, 1.0, 0.99, 0.9, 0.5, 1e-6, 5e-324]),
        min_p=r.choice([0.0, 0.0, 1e-6, 0.05, 1.0]),
        repetition_penalty=r.choice([1.0, 1.2, 0.5, 1e300]),
        presence_penalty=r.choice([0.0, 0.7, -1.0]),
        frequency_penalty=r.choice([0.0, 0.3, -2.0, 1e300]),
        bias_ids=array("q", bias_ids),
        biases=array("d", [r.choice([5.0, -5.0, 1e300, -torch.inf]) for _ in bias_ids]),
        mask=r.choice([None, None, words, torch.full_like(words, -1)]),
        seed=r.randrange(2**64),
        position=r.choice([0, 1, 4095, 2**40]),
        logprobs=r.choice([None, 0, 5, 20, 500]),
        ids=array("q", [r.randrange(-1, v + 1) for _ in range(length)]),
        prompt_length=r.randint(0, length),
    )


def at_a_boundary(logits: torch.Tensor, row: SamplingRow, allowed: int) -> bool:
    """Whether the random number is within rounding errors of the border between two tokens."""
    scores = filtered(masked(biased(penalized(logits[:allowed], row), row), row), row)
    through = scores.double().softmax(-1).cumsum(-1)
    return bool((through - uniform(row.seed, row.position)).abs().min() < 1e-6)


@pytest.mark.parametrize("v", [1, 2, 31, 97, 600, 5000])
def test_all_parameters_choose_the_same_tokens_as_the_definition(v, isa):
    r, generator = random.Random(v), torch.Generator().manual_seed(v)
    for _ in range(60):
        allowed, b = r.randint(max(1, v - 40), v), r.randint(1, 4)
        logits = some_logits(r, generator, b, v)
        rows = [some_row(r, generator, v, allowed) for _ in range(b)]
        ours, theirs = (ops.sample(logits, rows, allowed, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(ours.status, theirs.status)
        assert torch.equal(ours.top_ids, theirs.top_ids)
        same = ours.ids == theirs.ids
        assert all(at_a_boundary(logits[n], rows[n], allowed) for n in (~same).nonzero().flatten())
        for mine, other in ((ours.logprobs[same], theirs.logprobs[same]), (ours.top_logprobs, theirs.top_logprobs)):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 8.0])
@pytest.mark.parametrize("top_k", [0, 40, 3000, 40_000])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.999])
def test_the_released_vocabulary(spread, top_k, top_p, isa):
    v, allowed = 50304, 50280
    logits = spread * torch.randn(4, v, generator=torch.Generator().manual_seed(1))
    rows = [SamplingRow(temperature=1.5, top_k=top_k, top_p=top_p, seed=n, position=9, logprobs=20) for n in range(4)]
    ours, theirs = (ops.sample(logits, rows, allowed, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(ours.top_ids, theirs.top_ids)
    for n in (ours.ids != theirs.ids).nonzero().flatten():
        assert at_a_boundary(logits[n], rows[n], allowed)


def test_equal_logits_are_chosen_by_the_random_number(isa):
    """With a power of two of them all numbers are exact, so any other random number would show."""
    v = 2**15
    rows = [SamplingRow(temperature=1.0, seed=2**64 - 1 - n, position=n * 2**33) for n in range(50)]
    ids = ops.sample(torch.zeros(50, v), rows, v, backend="cpu").ids
    assert ids.tolist() == [int(uniform(row.seed, row.position) * v) for row in rows]


def test_neither_threads_nor_other_rows_nor_earlier_calls_change_a_row(isa, set_threads):
    r, generator = random.Random(5), torch.Generator().manual_seed(5)
    logits = some_logits(r, generator, 24, 3000)
    rows = [some_row(r, generator, 3000, 2990) for _ in range(24)]
    alone = [ops.sample(logits[n : n + 1], rows[n : n + 1], 2990, backend="cpu") for n in range(24)]
    order = list(range(24))
    for threads in (1, 2, 3):
        set_threads(threads)
        r.shuffle(order)
        together = ops.sample(logits[order], [rows[n] for n in order], 2990, backend="cpu")
        for place, n in enumerate(order):
            assert together.ids[place] == alone[n].ids[0]
            assert together.status[place] == alone[n].status[0]
            assert torch.equal(together.logprobs[place].view(torch.int32), alone[n].logprobs[0].view(torch.int32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_logit_is_detected_at_any_position(bad, isa):
    logits = torch.randn(75, 75)
    logits.fill_diagonal_(bad)
    status = ops.sample(logits, [SamplingRow(temperature=1.0)] * 75, 70, backend="cpu").status
    assert status.tolist() == [1] * 70 + [0] * 5


def test_inputs_are_not_modified_and_may_be_views_or_half_precision(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.randn(6, 40).to(dtype)
        before, view = wide.clone(), wide[::2, 3:33]
        rows = [
            SamplingRow(repetition_penalty=2.0, ids=array("q", [1, 2]), mask=torch.tensor([-2], dtype=torch.int32))
        ] * 3
        ours, theirs = (ops.sample(view, rows, 25, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(wide, before)
