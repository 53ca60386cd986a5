"""Policies in files: what they say is what a `RouterPolicy` of arrays says, and what they cannot say is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import make_model
from olmoe.errors import UserError
from olmoe.runner import RouterPolicy
from olmoe.runner.policy_file import read_policy, to_policy

CONFIG = make_model().config
L, E = CONFIG.num_hidden_layers, CONFIG.num_experts


def test_a_file_says_what_arrays_say(tmp_path):
    path = tmp_path / "policy.json"
    value = {
        "boost": [{"layer": 1, "expert": 2, "bias": 1.5}, {"expert": 2, "bias": 1}],
        "ban": [{"expert": 0}, {"layer": 0, "expert": 1}],
        "k": 1,
        "renormalize": True,
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    bias, banned = np.zeros((L, E)), np.zeros((L, E), dtype=bool)
    bias[:, 2] = 1
    bias[1, 2] = 2.5
    banned[:, 0] = True
    banned[0, 1] = True
    found, expected = read_policy(path).resolve(CONFIG), RouterPolicy(bias, banned, 1, True).resolve(CONFIG)
    np.testing.assert_array_equal(found.bias, expected.bias)
    assert found[1:] == expected[1:]


def test_nothing_changes_nothing():
    for value in ({}, {"boost": None, "ban": [], "k": None, "renormalize": None}):
        found = to_policy(value).resolve(CONFIG)
        assert not found.bias.any()
        assert found[1:] == RouterPolicy().resolve(CONFIG)[1:]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"bans": []}, "it has the key 'bans'; the keys are boost, ban, k, renormalize"),
        ({"ban": {}}, "ban must be a list, not {}"),
        ({"ban": [7]}, r"ban\[0\] must be an object with layer, expert, not 7"),
        ({"ban": [{"layer": 1}]}, r"ban\[0\] must be an object with layer, expert"),
        ({"ban": [{"expert": 1, "bias": 1}]}, r"ban\[0\] must be an object with layer, expert"),
        ({"ban": [{"expert": True}]}, r"ban\[0\] must have whole numbers"),
        ({"boost": [{"expert": 1}]}, r"boost\[0\].bias must be a number between"),
        ({"boost": [{"expert": 1, "bias": 1e9}]}, r"boost\[0\].bias must be a number between"),
        ({"boost": [{"expert": 1, "bias": float("nan")}]}, r"boost\[0\].bias must be a number between"),
        ({"k": 2.0}, "k must be a whole number, not 2.0"),
        ({"renormalize": 1}, "renormalize must be true or false, not 1"),
    ],
)
def test_what_is_wrong_is_named(value, sentence):
    with pytest.raises(UserError, match=sentence):
        to_policy(value)


def test_layers_and_experts_must_exist():
    with pytest.raises(UserError, match=f"the expert {E}, but the model's are 0 to {E - 1}"):
        to_policy({"ban": [{"expert": E}]}).resolve(CONFIG)
    with pytest.raises(UserError, match=f"the layer -1, but the model's are 0 to {L - 1}"):
        to_policy({"boost": [{"layer": -1, "expert": 0, "bias": 1}]}).resolve(CONFIG)
    with pytest.raises(UserError, match="leaves 0 experts"):
        to_policy({"ban": [{"expert": e} for e in range(E)]}).resolve(CONFIG)


def test_files_that_hold_no_policy(tmp_path):
    for content, sentence in (
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"x": 1}', "is wrong: it has"),
    ):
        (tmp_path / "p").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            read_policy(tmp_path / "p")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_policy(tmp_path / "none")
