"""The seed decides the order of examples; every example is seen as often as configured."""

from __future__ import annotations

from collections import Counter

import pytest

from olmoe.errors import ConfigError
from olmoe.train.config import BatchConfig
from olmoe.train.finetune.plan import Plan
from sentences import refused

LENGTHS = [[3, 5, 7, 2, 8, 4, 6, 1], [2, 2, 2, 2]]


def plan(seed=0, epochs=1.0, capacity=10, repeats=(1.0, 1.0)):
    sources = list(zip(LENGTHS, repeats, strict=True))
    return Plan(sources, capacity=capacity, epochs=epochs, batch=BatchConfig(sequences=2, accumulation=2), seed=seed)


def seen(made: Plan) -> Counter[int]:
    return Counter(n for step in range(made.steps) for batch in made.microbatches(step) for n in batch)


@pytest.mark.parametrize("capacity", [10, None])
def test_an_epoch_sees_every_example_once(capacity):
    assert seen(plan(capacity=capacity)) == Counter(range(12))
    assert seen(plan(capacity=capacity, epochs=2.0)) == Counter(dict.fromkeys(range(12), 2))


def test_repeats_weight_sources():
    counts = seen(plan(capacity=None, repeats=(0.5, 2.0)))
    assert sum(counts[n] for n in range(8)) == 4
    assert [counts[n] for n in range(8, 12)] == [2] * 4


def test_a_fraction_is_drawn_anew_each_epoch():
    """In the long run every sample is seen equally often."""
    made = plan(capacity=None, repeats=(0.5, 1.0), epochs=400.0)
    counts = seen(made)
    assert sum(counts[n] for n in range(8)) == 400 * 4
    assert all(150 < counts[n] < 250 for n in range(8))
    assert [counts[n] for n in range(8, 12)] == [400] * 4


def test_steps_are_full_except_the_last():
    made = plan(capacity=None)
    assert made.steps == 3
    assert [[len(batch) for batch in made.microbatches(step)] for step in range(3)] == [[2, 2]] * 3
    assert [len(batch) for batch in plan(capacity=None, epochs=0.5).microbatches(1)] == [2]


def test_the_seed_decides_and_epochs_differ():
    assert plan().rows == plan().rows
    assert plan().rows != plan(seed=1).rows
    rows = plan(epochs=2.0).rows
    assert sorted(map(sorted, rows[: len(rows) // 2])) != sorted(map(sorted, rows[len(rows) // 2 :]))
    assert "raise it" in refused(lambda: plan(epochs=0.01), ConfigError)
