"""The API description, and fuzzing by it: no answer is a 5xx, and all have the protocol's shape."""

from __future__ import annotations

import json
import random

import pytest

from olmoe.serve.protocol import ChatRequest, CompletionRequest


def test_the_description_names_every_field(server):
    status, description, _ = server.call("/openapi.json")
    assert (status, description["openapi"]) == (200, "3.1.0")
    schemas = description["components"]["schemas"]
    for model in (CompletionRequest, ChatRequest):
        assert set(schemas[model.__name__]["properties"]) == set(model.model_fields)
    assert {"/v1/models", "/health", "/ready", "/metrics", "/tokenizer_info"} <= set(description["paths"])
    references = set(json.dumps(description).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(schemas)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_schema_generated_bodies_get_no_5xx(server, path):
    schemathesis = pytest.importorskip("schemathesis", reason="the dev extra is not installed")
    import hypothesis

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json").include(path=path)
    (operation,) = [result.ok() for result in schema.get_all_operations()]

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def check(case):
        if isinstance(case.body, dict) and "completions" in path:
            for name in ("max_tokens", "max_completion_tokens"):  # requests must not take long
                if not isinstance(case.body.get(name), int) or case.body[name] > 3:
                    case.body[name] = 3
        answer = case.call(timeout=60)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    check()


VALUES = (None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 1e308, -1e-308, 0.5, "", "a", "\x00", "☃" * 9,
          [], [0], [-1], ["a"], [None], [[]], [[1]], {}, {"a": 1}, {"type": "json_object"}, "9" * 400)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "model"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)]
)
def test_any_value_in_any_field_gets_no_5xx(server, path, model):
    good = {"prompt": "a", "max_tokens": 2}
    if model is ChatRequest:
        good = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    for name in model.model_fields:
        for value in VALUES:
            body = {**good, name: value}
            status, answer, _ = server.call(path, body)
            assert status < 500, (body, answer)
            if status >= 400:
                assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.call("/health")[0] == 200
    assert server.idle()


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1e5000", "9" * 5000 + ".5"])
def test_extreme_numbers_get_no_5xx(server, number):
    for name in (*CompletionRequest.model_fields, "unknown"):
        for content in (number, f"[{number}]", f'{{"1": {number}}}', f'{{"ban": [{{"expert": {number}}}]}}'):
            body = f'{{"prompt": "a", "max_tokens": 1, "{name}": {content}}}'.encode()
            status, answer, _ = server.call("/v1/completions", body)
            assert status < 500, (body[:99], answer)


def test_messages_of_any_shape_get_no_5xx(server):
    chooser = random.Random(5)
    for _ in range(300):
        names = chooser.sample(["role", "content", "name", "tool_calls", "x"], 3)
        message = {name: chooser.choice(VALUES) for name in names}
        if chooser.random() < 0.7:
            message["role"] = chooser.choice(["user", "system", "assistant", "developer", "tool"])
        status, answer, _ = server.call("/v1/chat/completions", {"messages": [message], "max_tokens": 1})
        assert status < 500, (message, answer)
