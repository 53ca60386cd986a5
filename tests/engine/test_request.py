"""What a caller may ask for: every range is checked, with one sentence."""

from __future__ import annotations

import math

import pytest

from olmoe.engine.request import SamplingParams
from olmoe.errors import UserError


def test_defaults_are_greedy_and_unfiltered():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.seed, params.stop, params.ignore_eos) == (1.0, None, (), False)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1]),
        ("temperature", [-0.1, math.inf, math.nan]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, 1.01, math.nan]),
        ("min_p", [-0.01, 1.01, math.nan]),
        ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
        ("seed", [-1, 2**63]),
        ("stop", [("a", ""), "", (1,), (None,)]),
    ],
)
def test_values_outside_their_range_are_one_sentence(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} must be [^\n]*, not [^\n]*\\.$"):
            SamplingParams(**{name: value})


def test_limits_of_the_ranges_are_allowed():
    SamplingParams(max_new_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0, seed=0)
    SamplingParams(temperature=1e-9, top_k=10**9, top_p=1e-9, min_p=1, repetition_penalty=1e-3, seed=2**63 - 1)


def test_one_stop_string_needs_no_list():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ["a", "b"]
