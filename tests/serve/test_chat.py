"""/v1/chat/completions over a real server."""

from __future__ import annotations

import threading

import pytest

from olmoe import SamplingParams
from olmoe.serve import tools

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}


def ask(server, **fields):
    status, body, _ = server.call(PATH, {**GREEDY, **fields})
    assert status == 200, body
    return body


def test_the_answer_equals_the_librarys(server, tiny_llm):
    (expected,) = tiny_llm.chat(MESSAGES, SamplingParams(max_new_tokens=12))
    body = ask(server)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == {"eos": "stop", "length": "length"}[expected.finish_reason]
    assert body["object"] == "chat.completion"
    assert body["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_a_stream_begins_with_the_role_and_ends_with_the_usage(server):
    fields = {"n": 2, "seed": 4, "temperature": 1, "logprobs": True, "top_logprobs": 2}
    whole = ask(server, **fields)
    events = server.events(PATH, {**GREEDY, **fields, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events[:-2])
    assert all(event["object"] == "chat.completion.chunk" for event in events[:-1])
    for index, expected in enumerate(whole["choices"]):
        mine = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == expected["message"]["content"]
        assert mine[-1]["delta"] == {}
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [expected["finish_reason"]]
        scored = [entry for c in mine if c.get("logprobs") for entry in c["logprobs"]["content"]]
        assert scored == expected["logprobs"]["content"]


def test_logprobs(server):
    content = ask(server, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
        assert len(entry["top_logprobs"]) == 3
    assert ask(server, logprobs=True, top_logprobs=None)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_the_default_limit_is_the_remaining_context(server):
    body = ask(server, max_tokens=None, ignore_eos=True)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 512
    assert ask(server, max_tokens=9, max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_small_pool_lowers_the_default_limit(run_server, tiny_llm):
    running = run_server(cache_bytes=128 * tiny_llm.runner.position_bytes)
    body = ask(running, max_tokens=None, ignore_eos=True)
    assert body["usage"]["total_tokens"] == 128
    status, body, _ = running.call(PATH, {**GREEDY, "max_tokens": 300})
    assert status == 400
    assert "cache of 128 tokens" in body["error"]["message"]
    assert body["error"]["param"] == "messages"


def test_every_kind_of_message_is_accepted(server, tiny_llm):
    expected = tiny_llm.tokenizer.encode_chat(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "One\ntwo"},
            {"role": "assistant", "content": "Three"},
            {"role": "user", "content": "Four"},
        ]
    )
    body = ask(
        server,
        return_token_ids=True,
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Three"}], "refusal": None},
            {"role": "user", "content": "Four"},
        ],
    )
    assert body["prompt_token_ids"] == expected


def test_a_final_message_is_continued(server, tiny_llm):
    messages = [*MESSAGES, {"role": "assistant", "content": "Once upon"}]
    expected = tiny_llm.tokenizer.encode_chat(messages, continue_final_message=True)
    fields = {"messages": messages, "continue_final_message": True, "return_token_ids": True}
    assert ask(server, **fields, add_generation_prompt=False)["prompt_token_ids"] == expected
    assert ask(server, **fields)["prompt_token_ids"] == expected
    status, body, _ = server.call(PATH, {**GREEDY, **fields, "add_generation_prompt": True})
    assert (status, body["error"]["param"]) == (400, "messages")


def test_prompt_logprobs_and_routing(server):
    body = ask(server, prompt_logprobs=1, prompt_routing=True, routing=True)
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == body["prompt_routing"]["tokens"] == body["usage"]["prompt_tokens"]
    assert body["choices"][0]["routing"]["tokens"] == 12
    first = server.events(PATH, {**GREEDY, "prompt_routing": True})[0]
    assert first["prompt_routing"] == body["prompt_routing"]


def test_stop_strings_split_over_tokens_do_not_leak(server):
    whole = ask(server, max_tokens=60)["choices"][0]["message"]["content"]
    assert len(whole) > 20
    for begin in range(8, 14):
        stop = whole[begin : begin + 5]
        events = server.events(PATH, {**GREEDY, "max_tokens": 60, "stop": stop})
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
        assert text == whole[: whole.index(stop)]
        assert events[-2]["choices"][0]["stop_reason"] == stop


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages"),
    ],
)
def test_mistakes_are_named(server, fields, param):
    status, body, _ = server.call(PATH, {**GREEDY, **fields})
    assert (status, body["error"]["param"]) == (400, param), body
    assert body["error"]["type"] == "invalid_request_error"


def test_fields_of_others_that_change_nothing_are_taken(server):
    fields = {"reasoning_effort": "none", "modalities": ["text"], "store": True, "metadata": {"a": "b"}, "tools": [],
              "service_tier": "auto", "verbosity": "low", "logprobs": None, "stream": None, "parallel_tool_calls": True,
              "response_format": {"type": "text"}, "tool_choice": "none", "suffix": None}  # fmt: skip
    assert ask(server, **fields)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", [PATH, "/tokenize"])
def test_variables_of_a_template_may_have_any_name(server, path):
    body = {"messages": [{"role": "user", "content": "a"}]} | ({"max_tokens": 1} if path == PATH else {})
    assert server.call(path, {**body, "chat_template_kwargs": {"template": 1, "variables": 2, "loop": 3}})[0] == 200
    status, answer, _ = server.call(path, {**body, "chat_template_kwargs": {"self": 1}})  # but Jinja's own
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_more_messages_than_tokens_are_refused_before_they_are_rendered(server, monkeypatch):
    monkeypatch.setattr(type(server.state.tokenizer), "render_chat", None)
    messages = [{"role": "user", "content": ""}] * (server.state.context_length + 1)
    status, answer, _ = server.call(PATH, {"messages": messages})
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "has 513 messages" in answer["error"]["message"]


def test_large_bodies_are_parsed_off_the_event_loop(server, monkeypatch):
    """Calls in the history are not the request's tools, and there may be many."""
    threads = []
    original = tools.plan
    monkeypatch.setattr(
        tools, "plan", lambda *given: threads.append(threading.current_thread().name) or original(*given)
    )
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    assert server.call(PATH, {"messages": messages, "max_tokens": 1})[0] == 200
    assert len(threads) == 1
    assert threads[0].startswith("olmoe-serve")
