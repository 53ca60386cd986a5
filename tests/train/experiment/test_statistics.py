"""Statistics over seeds against hand calculations and printed tables."""

from __future__ import annotations

import math

import pytest

from olmoe.train.experiment.statistics import estimate, holm, paired, t_quantile, t_within


@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (99, 1.98422)],
)
def test_quantiles_match_a_printed_table(df, t):
    assert t_quantile(0.95, df) == pytest.approx(t, abs=1e-5 * t)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.776, 7.5])
def test_probabilities_match_their_closed_forms(t):
    assert t_within(t, 1) == pytest.approx(2 / math.pi * math.atan(t), abs=1e-12)
    assert t_within(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-12)
    root = math.sqrt(3)
    third = 2 / math.pi * (math.atan(t / root) + (t / root) / (1 + t * t / 3))
    assert t_within(t, 3) == pytest.approx(third, abs=1e-12)
    x = t / math.sqrt(4 + t * t)
    assert t_within(t, 4) == pytest.approx(1.5 * x - 0.5 * x**3, abs=1e-12)
    assert t_within(-t, 4) == t_within(t, 4)


def test_many_degrees_of_freedom_approach_the_normal_distribution():
    assert t_within(1.959964, 10001) == pytest.approx(0.95, abs=1e-4)
    assert t_within(math.inf, 4) == 1


def test_an_estimate_matches_one_worked_out_by_hand():
    """2, 4, 4, 4, 6: mean 4, squares of deviations 8, sd sqrt(2), standard error sqrt(2 / 5)."""
    found = estimate([2, 4, 4, 4, 6])
    assert (found.n, found.mean) == (5, 4)
    assert found.sd == pytest.approx(math.sqrt(2))
    half = 2.776445 * math.sqrt(0.4)
    assert (found.low, found.high) == pytest.approx((4 - half, 4 + half), abs=1e-5)
    assert found.t == pytest.approx(4 / math.sqrt(0.4))
    x = found.t / math.sqrt(4 + found.t**2)
    assert found.p == pytest.approx(1 - (1.5 * x - 0.5 * x**3), abs=1e-12)


def test_pairing_cancels_the_effect_of_the_seed():
    a = [5.0, 7.0, 6.0]
    found = paired(a, [x - d for x, d in zip(a, (0.1, 0.2, 0.3), strict=True)])
    assert found.mean == pytest.approx(-0.2)
    assert found.sd == pytest.approx(0.1)
    assert found.t == pytest.approx(-0.2 / (0.1 / math.sqrt(3)))
    assert found.p == pytest.approx(1 - found.t / -math.sqrt(2 + found.t**2))


def test_one_seed_has_no_interval_and_equal_seeds_have_an_empty_one():
    alone = estimate([3.0])
    assert alone.mean == 3
    assert all(math.isnan(value) for value in (alone.sd, alone.low, alone.high, alone.t, alone.p))
    assert (estimate([2.0, 2.0]).t, estimate([2.0, 2.0]).p) == (math.inf, 0)
    assert (estimate([0.0, 0.0]).t, estimate([0.0, 0.0]).p) == (0, 1)


def test_holm_raises_the_smallest_p_values_most_and_keeps_the_order():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
