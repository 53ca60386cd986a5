"""The field `router_policy`: it means the same as a policy file, and mistakes name the field's path."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from olmoe.config import ModelConfig
from olmoe.runner import RouterPolicy
from olmoe.runner.policy_file import to_policy
from olmoe.serve.errors import ApiError
from olmoe.serve.router_policy import RouterPolicyModel, described, router_policy

LAYERS, EXPERTS = 4, 64
COMPLETION = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "routing": True}
VALUES = [
    {},
    {"boost": [{"layer": 3, "expert": 12, "bias": 2.0}, {"experts": [1, 2], "bias": -1}]},
    {"ban": [{"expert": 7}], "pin": [{"layer": 0, "experts": [4, 9]}], "k": 4, "renormalize": True, "temperature": 0.5},
    {"allow": [{"layer": 1, "experts": list(range(20))}], "temperature": [1, 2, 0.5, 1]},
]


def ask(server, **fields):
    status, body, _ = server.call("/v1/completions", COMPLETION | fields)
    assert status == 200, body
    choice = body["choices"][0]
    routing = choice["routing"]
    shape = routing["tokens"], routing["layers"], routing["k"]
    ids = np.frombuffer(base64.b64decode(routing["experts"]), routing["dtype"]).reshape(shape)
    return choice["text"], ids


@pytest.mark.parametrize("value", VALUES)
def test_a_request_policy_means_the_same_as_a_file(value):
    assert router_policy(RouterPolicyModel.model_validate(value), LAYERS, EXPERTS) == to_policy(value)


def test_pinned_and_allowed_experts_are_honoured(server):
    plain_text, plain = ask(server)
    seldom = int(np.bincount(plain[:, 1].ravel(), minlength=EXPERTS).argmin())
    _, pinned = ask(server, router_policy={"pin": [{"layer": 1, "expert": seldom}]})
    assert (pinned[:, 1] == seldom).any(axis=1).all()
    np.testing.assert_array_equal(pinned[0, 0], plain[0, 0])
    _, allowed = ask(server, router_policy={"allow": [{"layer": 2, "experts": list(range(10, 20))}]})
    assert set(allowed[:, 2].ravel()) <= set(range(10, 20))
    assert not set(allowed[:, 3].ravel()) <= set(range(10, 20))
    tempered_text, tempered = ask(server, router_policy={"temperature": 3.0})
    np.testing.assert_array_equal(tempered[0, 0], plain[0, 0])
    assert tempered_text != plain_text
    assert ask(server, router_policy={"temperature": 1})[0] == plain_text


def test_a_server_may_have_a_default_policy(run_server, server):
    default = {"ban": [{"layer": 0, "experts": [5, 6, 7]}], "temperature": 3.0}
    other = run_server(router_policy=to_policy(default))
    assert other.call("/v1/models")[1]["data"][0]["olmoe"]["router_policy"] == default
    assert "router_policy" not in server.call("/v1/models")[1]["data"][0]["olmoe"]
    plain, changed = ask(server)[0], ask(server, router_policy=default)[0]
    assert plain != changed
    assert ask(other)[0] == changed
    assert ask(other, router_policy={})[0] == plain
    assert (
        ask(other, router_policy={"k": 3, "temperature": 2.0})[0]
        == ask(server, router_policy={"k": 3, "temperature": 2.0})[0]
        != changed
    )
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    texts = [
        each.call("/v1/chat/completions", chat | more)[1]["choices"][0]["message"]["content"]
        for each, more in ((other, {}), (server, {"router_policy": default}), (server, {}))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_policies_with_arrays_are_described():
    config = ModelConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    pinned = np.zeros((2, 4), dtype=bool)
    pinned[1, 3] = True
    found = described(RouterPolicy(pinned=pinned, temperature=0.5), config)
    assert found == {"pin": [{"layer": 1, "expert": 3}], "temperature": [0.5, 0.5], "k": 2, "renormalize": False}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"pin": [{"layer": 0}]}, "router_policy.pin[0].expert"),
        ({"ban": [{"expert": 1}, {"expert": 1, "experts": [2]}]}, "router_policy.ban[1].expert"),
        ({"allow": [{"experts": [1, 64]}]}, "router_policy.allow[0].experts"),
        ({"pin": [{"layer": 4, "expert": 1}]}, "router_policy.pin[0].layer"),
        ({"boost": [{"expert": 1, "bias": 1e9}]}, "router_policy.boost[0].bias"),
        ({"ban": [{"experts": [1] * 5000}, {"expert": 2}, {"experts": [3] * 4000}]}, "router_policy"),
        ({"temperature": 0}, "router_policy.temperature"),
        ({"temperature": [1, 1, 1, float("nan")]}, "router_policy.temperature"),
    ],
)
def test_policy_mistakes_name_the_field_path(value, param):
    with pytest.raises(ApiError) as caught:
        router_policy(RouterPolicyModel.model_validate(value), LAYERS, EXPERTS)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"pin": [{"expert": 1}], "ban": [{"expert": 1}]}, "both pins and bans the expert 1 of layer 0"),
        ({"pin": [{"experts": [1, 2, 3]}], "k": 2}, "pins 3 experts in a layer, but each token chooses 2"),
        ({"allow": [{"experts": [1, 2, 3]}]}, "leaves 3 experts in a layer, but each token chooses 8"),
        ({"temperature": [1, 1]}, "one number or 4, one per layer"),
    ],
)
def test_contradictory_policies_are_refused(server, value, sentence):
    status, body, _ = server.call("/v1/completions", COMPLETION | {"router_policy": value})
    assert (status, body["error"]["param"]) == (400, "router_policy")
    assert sentence in body["error"]["message"]
