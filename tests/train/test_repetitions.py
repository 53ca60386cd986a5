"""Windows in which an n-gram repeats many times in a row."""

from __future__ import annotations

import numpy as np
import pytest

from olmoe.train.repetitions import has_repetition

RANDOM = np.random.default_rng(3)


def window(period: int, length: int, start: int = 50, of: int = 600) -> np.ndarray:
    """Ids without repetition except for a run of `length` ids with period `period`."""
    ids = np.arange(1000, 1000 + of)
    ids[start : start + length] = np.resize(np.arange(period), length)
    return ids


@pytest.mark.parametrize("period", range(1, 14))
def test_a_run_of_32_repeats_is_found_and_one_of_31_is_not(period):
    for start in (0, 50, 600 - 32 * period):
        assert has_repetition(window(period, 32 * period, start), 32)
        assert not has_repetition(window(period, 32 * period - 1, start), 32)


def test_ngrams_beyond_the_longest_are_ignored():
    assert not has_repetition(window(14, 14 * 38), 32)
    assert has_repetition(window(14, 14 * 38), 32, longest=14)


def test_repeats_must_be_consecutive():
    ids = np.tile([1, 2, 3, 4], 40)
    assert has_repetition(ids, 32)
    ids[::17] = 9
    assert not has_repetition(ids, 32)
    assert has_repetition(ids, 3)


def test_the_fast_search_agrees_with_a_slow_one():
    def slow(ids, times, longest):
        return any(
            all(ids[i] == ids[i + period] for i in range(start, start + (times - 1) * period))
            for period in range(1, longest + 1)
            for start in range(len(ids) - times * period + 1)
        )

    found = []
    for _ in range(300):
        ids = RANDOM.integers(0, 2, RANDOM.integers(2, 30))
        times, longest = int(RANDOM.integers(2, 6)), int(RANDOM.integers(1, 6))
        found.append(has_repetition(ids, times, longest))
        assert found[-1] == slow(ids, times, longest), (ids, times, longest)
    assert 50 < sum(found) < 250


def test_short_windows_have_no_repetitions():
    assert not has_repetition(np.array([1, 1]), 32)
    assert has_repetition(np.array([1, 1]), 2)
