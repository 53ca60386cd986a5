"""Policies in files: what they say is what a `RouterPolicy` of arrays says, and what they cannot say is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import make_model
from olmoe.errors import UserError
from olmoe.runner import RouterPolicy
from olmoe.runner.policy_file import NamedPolicy, as_policy, named, read_policy, to_json, to_policy, write_policy

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


def test_pins_what_alone_is_allowed_and_temperatures():
    value = {
        "pin": [{"layer": 0, "expert": 3}, {"experts": [5]}],
        "allow": [{"layer": 1, "experts": [0, 2, 5, 7]}, {"layer": 1, "expert": 4}],
        "temperature": [0.5, 2],
    }
    banned, pinned = np.zeros((L, E), dtype=bool), np.zeros((L, E), dtype=bool)
    banned[1, [1, 3, 6]] = True  # of layer 0 nothing is said, so all of it is allowed
    pinned[0, [3, 5]] = pinned[1, 5] = True
    found = to_policy(value).resolve(CONFIG)
    expected = RouterPolicy(banned=banned, pinned=pinned, temperature=[0.5, 2.0]).resolve(CONFIG)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


POLICIES = [
    NamedPolicy(),
    NamedPolicy(boost=((None, 1, 2.5), (0, 1, 2.5), (0, 2, 2.5), (0, 3, -1.0)), k=2, renormalize=False),
    NamedPolicy(ban=((1, 2), (1, 0), (None, 7)), pin=((0, 1),), temperature=0.5),
    NamedPolicy(allow=tuple((layer, e) for layer in range(L) for e in range(4)), temperature=(1.0, 0.25)),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_written_is_read(tmp_path, policy):
    write_policy(tmp_path / "policy.json", policy)
    assert read_policy(tmp_path / "policy.json") == policy
    assert to_policy(to_json(policy)) == policy
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_a_file_has_an_entry_a_line(tmp_path):
    write_policy(tmp_path / "policy.json", NamedPolicy(ban=((0, 1), (0, 2), (1, 5)), k=4))
    text = (tmp_path / "policy.json").read_text(encoding="utf-8")
    assert text == (
        '{\n  "ban": [\n    {"layer": 0, "experts": [1, 2]},\n    {"layer": 1, "expert": 5}\n  ],\n  "k": 4\n}\n'
    )


def test_a_policy_of_arrays_has_a_file():
    bias = np.random.default_rng(0).normal(size=(L, E))
    banned, pinned = np.zeros((L, E), dtype=bool), np.zeros((L, E), dtype=bool)
    banned[0, 2] = pinned[1, 4] = True
    policy = RouterPolicy(bias, banned, 2, True, pinned, [1.0, 3.0]).resolve(CONFIG)
    again = to_policy(json.loads(json.dumps(to_json(named(policy))))).resolve(CONFIG)
    for one, other in zip(again, policy, strict=True):
        np.testing.assert_array_equal(one, other)
    own = RouterPolicy().resolve(CONFIG)
    assert named(own) == NamedPolicy(k=own.top_k, renormalize=own.renormalize)


def test_a_policy_may_be_given_in_any_way(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"k": 1}', encoding="utf-8")
    for given in (path, str(path), {"k": 1}):
        assert as_policy(given) == NamedPolicy(k=1)
    policy = RouterPolicy(top_k=1)
    assert as_policy(policy) is policy
    with pytest.raises(UserError, match="The router policy is wrong: it has the key 'x'"):
        as_policy({"x": 1})
    with pytest.raises(TypeError, match="cannot be a int"):
        as_policy(3)


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
        (
            {"pin": [{"expert": 1, "experts": [2]}]},
            r"pin\[0\] must be an object with layer, expert, not .* a list, experts",
        ),
        ({"pin": [{"experts": 2}]}, r"pin\[0\] must have whole numbers"),
        ({"allow": [{"experts": [1]}, {"experts": [1, 2.0]}]}, r"allow\[1\] must have whole numbers"),
        ({"temperature": 0}, "temperature must be a number between 0.001 and 1000, not 0"),
        ({"temperature": True}, "temperature must be a number between"),
        ({"temperature": [1, -1]}, r"temperature\[1\] must be a number between"),
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
