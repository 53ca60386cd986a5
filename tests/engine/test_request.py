"""Request parameters: every range is checked, with a one-sentence error."""

from __future__ import annotations

import decimal
import fractions
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from olmoe.engine.request import Completion, Request, Timings, TokenLogprob, in_batch
from olmoe.engine.sampling_params import SamplingParams, whole_number
from olmoe.errors import TokenizerError, UserError


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
        ("presence_penalty", [math.inf, -math.inf, math.nan]),
        ("frequency_penalty", [math.inf, -math.inf, math.nan]),
        ("logit_bias", [[1], {-1: 1.0}, {1.5: 1.0}, {"a": 1.0}, {True: 1.0}, {2**63: 1.0}, {1: "a"}, {1: None}]),
        ("logit_bias", [{1: math.nan}, {1: math.inf}, {1: True}, {"-1": 1.0}, "1"]),
        ("seed", [-1, 2**63]),
        ("stop", [("a", ""), "", (1,), (None,)]),
    ],
)
def test_values_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} must be [^\n]*, not [^\n]*\\.$"):
            SamplingParams(**{name: value})


def test_limits_of_the_ranges_are_allowed():
    SamplingParams(max_new_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0, seed=0)
    SamplingParams(temperature=1e-9, top_k=10**9, top_p=1e-9, min_p=1, repetition_penalty=1e-3, seed=2**63 - 1)


def test_a_single_stop_string_needs_no_list():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ["a", "b"]


def test_biases_may_have_json_string_keys_and_may_ban():
    assert SamplingParams(logit_bias={"7": 1, 8: -math.inf}).logit_bias == {7: 1.0, 8: -math.inf}
    assert SamplingParams(logit_bias={}).logit_bias == {}


def test_identical_looking_requests_are_distinct():
    first, second = (Request([1], SamplingParams(), 5) for _ in range(2))
    assert first != second


NAMES = [field.name for field in fields(SamplingParams)]
WHOLE = ["max_new_tokens", "top_k", "seed", "logprobs"]
NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty"]


@pytest.mark.parametrize("name", NAMES)
def test_none_means_the_default(name):
    assert SamplingParams(**{name: None}) == SamplingParams()
    assert SamplingParams(**dict.fromkeys(NAMES)) == SamplingParams()


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_may_be_numpy_scalars(name):
    for value in (np.int64(3), np.int8(3), np.uint32(3), np.array([3])[0]):
        read = getattr(SamplingParams(**{name: value}), name)
        assert (read, type(read)) == (3, int)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_numpy_scalars(name):
    for value in (np.float64(0.5), np.float32(0.5), np.float16(0.5), fractions.Fraction(1, 2), np.int64(1), 1):
        read = getattr(SamplingParams(**{name: value}), name)
        assert (read, type(read)) == (float(value), float)


@pytest.mark.parametrize(
    "value", [5.5, 5.0, "5", True, np.True_, np.float64(5), math.nan, [5], 5j, b"5", torch.tensor(5)]
)
def test_whole_numbers_of_another_type_are_refused(value):
    for name in WHOLE:
        with pytest.raises(UserError, match=rf"^{name} must be a whole number, not [^\n]+\.$"):
            SamplingParams(**{name: value})
    with pytest.raises(UserError, match=r"^top_k must be a whole number, not 5\.5\.$"):
        SamplingParams(top_k=5.5)


@pytest.mark.parametrize(
    "value", ["0.5", True, np.False_, [0.5], 1j, b"1", decimal.Decimal(1), 10**400, np.ones(2), {}]
)
def test_numbers_of_another_type_are_refused(value):
    for name in NUMBERS:
        with pytest.raises(UserError, match=rf"^{name} must be a number, not [^\n]+\.$"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("value", ["no", 0, 1, 2.0, [], "True", torch.tensor(True)])
def test_flags_must_be_true_or_false(value):
    with pytest.raises(UserError, match=r"^ignore_eos must be True or False, not [^\n]+\.$"):
        SamplingParams(ignore_eos=value)
    assert SamplingParams(ignore_eos=np.True_).ignore_eos is True


@pytest.mark.parametrize("value", [5, 5.5, b"END", {"a": 1}, True, object()])
def test_stop_of_another_type_is_refused(value):
    with pytest.raises(UserError, match=r"^stop must be a text or several, not [^\n]+\.$"):
        SamplingParams(stop=value)
    with pytest.raises(UserError, match=r"^stop must be made of non-empty strings, not "):
        SamplingParams(stop=["a", value])


def test_later_changes_to_the_callers_stop_list_have_no_effect():
    texts = ["a"]
    params = SamplingParams(stop=texts)
    texts.append("b")
    assert params.stop == ["a"]
    for several in (iter("ab"), {"a": 1, "b": 2}.keys(), np.array(["a", "b"])):
        assert SamplingParams(stop=several).stop == ("a", "b")


def test_nan_is_in_no_range():
    for name in NUMBERS:
        for nan in (math.nan, np.float32("nan")):
            with pytest.raises(UserError, match=f"^{name} must be [^\n]*, not nan\\.$"):
                SamplingParams(**{name: nan})


def test_a_completion_of_a_request_in_progress_is_cancelled():
    request = Request([5, 6], SamplingParams(logprobs=0), 9, token_ids=[7], text="x")
    request.logprobs.append(TokenLogprob(7, -0.5, {}))
    completion = request.completion()
    assert completion == Completion("x", [7], "cancelled", 2, [TokenLogprob(7, -0.5, {})])
    request.token_ids.append(8)
    request.finish_reason, request.text = "eos", "xy"
    assert completion.token_ids == [7]  # not the later addition
    assert request.completion() == Completion("xy", [7, 8], "eos", 2, completion.logprobs)
    assert Request([5], SamplingParams(), 1).completion().logprobs is None


def test_equality_of_completions_ignores_timings():
    assert Completion("x", [7], "eos", 2, timings=Timings(1, 2, 3)) == Completion("x", [7], "eos", 2)
    assert Timings(1, 2, 3).total_seconds == 6


def test_an_error_in_a_batch_keeps_its_type_and_names_the_prompt():
    error = in_batch(TokenizerError("No such chat."), "prompts[3]")
    assert (type(error), str(error)) == (TokenizerError, "No such chat (prompts[3]).")
    assert str(in_batch(UserError("No."), "")) == "No."


def test_whole_number_arguments_are_checked():
    assert whole_number("n", np.int64(5), least=1) == 5
    for value in (0, 1.0, True, "5", None, math.inf):
        with pytest.raises(UserError, match="^n must be a whole number, at least 1, not "):
            whole_number("n", value, least=1)
