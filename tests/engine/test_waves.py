"""Every sequence is in one wave, and no wave needs more room than it may."""

from __future__ import annotations

import random

import pytest

from olmoe.engine.waves import waves


@pytest.mark.parametrize(
    ("needs", "budget", "most", "expected"),
    [
        ([], 10, 4, []),
        ([5], 10, 4, [[0]]),
        ([5], 1, 4, [[0]]),  # more than there is room for, but alone
        ([2, 9, 5], 10, 4, [[1], [2, 0]]),
        ([3, 3, 3, 3], 6, 4, [[0, 1], [2, 3]]),
        ([3, 3, 3, 3], 100, 3, [[0, 1, 2], [3]]),
        ([3, 3, 3, 3], 0, 4, [[0], [1], [2], [3]]),
    ],
)
def test_waves(needs, budget, most, expected):
    assert list(waves(needs, budget, most)) == expected


def test_no_wave_exceeds_its_budget_and_none_could_take_the_next_sequence():
    choose = random.Random(0)
    for _ in range(50):
        needs = [choose.randint(1, 50) for _ in range(choose.randint(1, 60))]
        budget, most = choose.randint(1, 300), choose.randint(1, 12)
        found = list(waves(needs, budget, most))
        assert sorted(number for wave in found for number in wave) == list(range(len(needs)))
        for wave, following in zip(found, [*found[1:], []], strict=True):
            longest = max(needs[number] for number in wave)
            assert len(wave) == 1 or len(wave) * longest <= budget
            assert len(wave) <= most
            assert not following or len(wave) == most or (len(wave) + 1) * longest > budget
