"""Routes, keys, other origins, errors outside endpoints, and the API description."""

from __future__ import annotations

import pytest

from olmoe.serve.state import ServeSettings

COMPLETION = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def guarded(tiny_llm):
    from serve.conftest import end, start

    running = start(
        tiny_llm, ServeSettings(port=0, api_keys=("secret", "other"), cors_origins=("https://page.example",))
    )
    yield running
    end(running)


def test_models_are_listed(server):
    status, body, _ = server.call("/v1/models")
    assert status == 200
    (card,) = body["data"]
    assert (card["id"], card["max_model_len"]) == ("olmoe-tiny", 512)
    assert card["olmoe"] == {"layers": 4, "experts": 64, "experts_per_token": 8}
    assert server.call("/models")[1] == body
    assert server.call("/v1/models/olmoe-tiny")[1] == card
    status, body, _ = server.call("/v1/models/none")
    assert (status, body["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e%2fapp.py", 404),
        ("GET", "/page/none.js", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/chat/completions", 405),
    ],
)
def test_unknown_routes_give_errors_in_the_same_shape(server, method, path, status):
    got, body, headers = server.call(path, method=method)
    assert (got, set(body["error"])) == (status, {"message", "type", "param", "code"})
    if status == 405:
        assert headers["allow"]


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer secret"}, {"authorization": "bearer other"}, {"x-api-key": "secret"}]
)
def test_a_valid_key_is_required(guarded, headers):
    assert guarded.call("/v1/completions", COMPLETION, headers=headers)[0] == 200
    assert guarded.call("/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {"x-api-key": ""}],
)
@pytest.mark.parametrize("path", ["/v1/models", "/models", "/metrics", "/openapi.json", "/tokenizer_info", "/nowhere"])
def test_all_routes_but_probes_require_a_key(guarded, headers, path):
    status, body, answered = guarded.call(path, headers=headers)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    assert answered["www-authenticate"] == "Bearer"


def test_a_post_without_a_key_is_refused_before_its_body(guarded):
    assert guarded.call("/v1/completions", b"x" * 100)[0] == 401
    assert guarded.call("/v1/chat/completions", {"messages": []})[0] == 401


def test_probes_need_no_key(guarded):
    assert guarded.call("/health")[0] == guarded.call("/ready")[0] == 200
    assert guarded.call("/")[0] in (200, 404)  # the page, which asks for the key by itself


def test_any_key_is_accepted_if_none_is_configured(server):
    assert server.call("/v1/completions", COMPLETION, headers={"authorization": "Bearer fake-api-key"})[0] == 200


def test_each_key_has_its_own_prefix_cache(guarded, run_server):
    prompt = "The little dog ran to the park and played with the red ball all day long. " * 12

    def cached(running, key, **fields):
        body = {**COMPLETION, "prompt": prompt, **fields}
        answer = running.call("/v1/completions", body, headers={"x-api-key": key})[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(guarded, "secret") > 0, cached(guarded, "secret") > 0] == [False, True]
    assert [cached(guarded, "other") > 0, cached(guarded, "other") > 0] == [False, True]
    assert cached(guarded, "secret", cache_salt="mine") == 0
    assert cached(guarded, "secret", cache_salt="mine") > 0
    shared = run_server(ServeSettings(port=0, api_keys=("secret", "other"), share_prefixes=True))
    assert [cached(shared, "secret") > 0, cached(shared, "other") > 0] == [False, True]


def test_other_origins_are_refused_by_default(server):
    headers = {"origin": "https://evil.example"}
    _, _, answered = server.call("/v1/models", headers=headers)
    assert "access-control-allow-origin" not in answered
    status, _, answered = server.call(
        "/v1/completions", method="OPTIONS", headers={**headers, "access-control-request-method": "POST"}
    )
    assert status == 405
    assert "access-control-allow-origin" not in answered


def test_allowed_origins_are_accepted(guarded):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    status, _, answered = guarded.call("/v1/completions", method="OPTIONS", headers=asked)
    assert (status, answered["access-control-allow-origin"]) == (200, "https://page.example")
    _, _, answered = guarded.call("/v1/models", headers={"origin": "https://page.example"})
    assert answered["access-control-allow-origin"] == "https://page.example"  # also on errors, for pages to read
    _, _, answered = guarded.call("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answered


def test_the_queue_is_bounded(run_server):
    running = run_server(ServeSettings(port=0, max_queued_requests=4, max_queued_tokens=40), max_rows=1)
    long = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
    import threading

    from serve.conftest import until

    threads = [threading.Thread(target=running.call, args=("/v1/completions", long), daemon=True)]
    threads[0].start()
    assert until(lambda: running.engine.statistics().running == 1)
    threads += [threading.Thread(target=running.call, args=("/v1/completions", {**long, "n": 3}), daemon=True)]
    threads[1].start()
    assert until(lambda: running.state.mailbox.queued()[0] == 3)
    status, body, headers = running.call("/v1/completions", {**long, "n": 2})
    assert (status, headers["retry-after"], body["error"]["code"]) == (503, "1", "server_overloaded")
    status, body, _ = running.call("/v1/completions", {**long, "prompt": "word " * 60})
    assert status == 503
    assert "tokens wait already" in body["error"]["message"]
    status, body, _ = running.call("/v1/completions", {**long, "n": 5})
    assert (status, body["error"]["param"]) == (400, "prompt")
    text = running.call("/metrics")[1]
    assert 'reason="queue_requests"} 1.0' in text
    assert 'reason="queue_tokens"} 1.0' in text


def test_a_failing_engine_is_reported_to_all_clients(run_server, monkeypatch):
    running = run_server()
    assert running.call("/health")[0] == 200

    def fail(*_):
        raise RuntimeError("the runner broke")

    monkeypatch.setattr(running.engine, "step", fail)
    status, body, _ = running.call("/v1/completions", COMPLETION)
    assert status == 503
    assert "the runner broke" in body["error"]["message"]
    assert running.call("/health")[0] == running.call("/ready")[0] == 503
    assert running.call("/v1/completions", COMPLETION)[0] == 503
    assert running.call("/tokenize", {"prompt": "a"})[0] == 200
