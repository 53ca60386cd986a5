"""Anthropic's POST /v1/messages of a real server, through the anthropic package and without it."""

from __future__ import annotations

import asyncio
import threading

import anthropic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mangled_bodies import encoded, mangled
from olmoe.serve.messages_models import MessagesRequest
from olmoe.serve.state import ServeSettings

MODEL = "olmoe-tiny"
SAID = [{"role": "user", "content": "def add(a, b):"}]
GREEDY = {"temperature": 0}


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def chat_of(server, messages=SAID, **fields):
    """What /v1/chat/completions answers."""
    status, answer, _ = server.call("/v1/chat/completions", {"messages": messages, "temperature": 0, **fields})
    assert status == 200, answer
    return answer


def asked(client, messages=SAID, **fields):
    return client.messages.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 24, "extra_body": GREEDY} | fields
    )


# ---- answers ----


def test_the_answer_equals_chat_completions(server, client):
    chat = chat_of(server, max_tokens=24)
    message = asked(client)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == chat["choices"][0]["message"]["content"] != ""
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 24
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == chat["usage"]["prompt_tokens"]
    blocks = [{"role": "user", "content": [{"type": "text", "text": "def add(a, b):"}]}]
    assert asked(client, blocks).content[0].text == message.content[0].text


@pytest.mark.parametrize("system", ["Write Python.", [{"type": "text", "text": "Write Python."}]])
def test_the_system_prompt_is_used(server, client, system):
    chat = chat_of(server, [{"role": "system", "content": "Write Python."}, *SAID], max_tokens=24)
    assert asked(client, system=system).content[0].text == chat["choices"][0]["message"]["content"]


def test_sampling_equals_chat_completions(server, client):
    fields = {"temperature": 1.5, "top_p": 0.8, "seed": 11, "top_k": 30, "ignore_eos": True}
    chat = chat_of(server, max_tokens=24, **fields)
    assert asked(client, extra_body=fields).content[0].text == chat["choices"][0]["message"]["content"]


def test_the_stop_sequence_is_reported(client):
    text = asked(client).content[0].text
    message = asked(client, stop_sequences=["never to be seen", text[3]])
    assert message.content[0].text == text[: text.index(text[3])]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", text[3])


def test_a_prefilled_answer_is_continued(server, client):
    whole = chat_of(
        server, [*SAID, {"role": "assistant", "content": "    return"}], max_tokens=24, continue_final_message=True,
        add_generation_prompt=False,
    )  # fmt: skip
    message = asked(client, [*SAID, {"role": "assistant", "content": "    return"}])
    assert message.content[0].text == whole["choices"][0]["message"]["content"]
    assert message.content[0].text != asked(client).content[0].text


def test_a_full_context_is_distinguished_from_the_limit(server, client):
    message = asked(client, max_tokens=4000, extra_body={"ignore_eos": True, "temperature": 0})
    assert message.stop_reason == "model_context_window_exceeded"
    used = message.usage.input_tokens + message.usage.cache_read_input_tokens + message.usage.output_tokens
    assert used >= server.state.context_length


def test_routing_equals_chat_completions(server, client):
    policy = {"ban": [{"layer": 0, "expert": 5}], "k": 4}
    chat = chat_of(server, max_tokens=8, routing=True, router_policy=policy)
    message = asked(client, max_tokens=8, extra_body=GREEDY | {"routing": True, "router_policy": policy})
    assert message.routing == chat["choices"][0]["routing"]
    assert message.routing["tokens"] == 8


def test_a_repeated_prompt_is_served_from_the_cache(client):
    said = [{"role": "user", "content": "nine eight seven six five four three " * 20}]
    first = asked(client, said, max_tokens=1).usage
    second = asked(client, said, max_tokens=1).usage
    assert second.cache_read_input_tokens > 0
    total = first.input_tokens + first.cache_read_input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == total


def test_tokens_are_counted(client):
    usage = asked(client, system="Write Python.").usage
    count = client.messages.count_tokens(model=MODEL, messages=SAID, system="Write Python.")
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


# ---- streams ----


def test_a_stream_has_the_same_content(client):
    whole = asked(client)
    with client.messages.stream(model=MODEL, messages=SAID, max_tokens=24, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert [block.text for block in final.content] == [text]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == 24
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == (
        whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    )


def test_events_have_names_and_are_ordered(server):
    body = {"messages": SAID, "max_tokens": 4, "stream": True, "temperature": 0}
    status, text, headers = server.call("/v1/messages", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "[DONE]" not in text
    first = server.events("/v1/messages", body)[0]
    count = server.call("/v1/messages/count_tokens", {"messages": SAID})[1]["input_tokens"]
    assert first["message"]["usage"]["input_tokens"] == count


def test_concurrent_requests_get_the_same_as_alone(server):
    said = [[{"role": "user", "content": f"Number {i}:"}] for i in range(6)]

    async def one(client, messages):
        async with client.messages.stream(model=MODEL, messages=messages, max_tokens=16, extra_body=GREEDY) as stream:
            return "".join([part async for part in stream.text_stream])

    async def run():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, messages) for messages in said))
            alone = []
            for messages in said:
                message = await client.messages.create(model=MODEL, messages=messages, max_tokens=16, extra_body=GREEDY)
                alone.append(message.content[0].text)
        return together, alone

    together, alone = asyncio.run(run())
    assert together == alone


def test_a_disconnected_clients_work_is_aborted(server, client):
    body = {"ignore_eos": True}
    with client.messages.stream(model=MODEL, messages=SAID, max_tokens=450, extra_body=body) as stream:
        next(stream.text_stream)
    assert server.idle()


def test_a_stopping_server_says_so(run_server):
    server = run_server()
    found = []
    begun = threading.Event()

    def read():
        with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            try:
                stream = client.messages.create(
                    model=MODEL, messages=SAID, max_tokens=480, stream=True, extra_body={"ignore_eos": True}
                )
                for event in stream:
                    found.append(event.type)
                    begun.set()
            except anthropic.APIStatusError as error:
                found.append(error.body["error"])

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    server.stop()
    server.stop()
    reader.join(20)
    if found[-1] != "message_stop":  # it was faster
        assert found[-1]["type"] == "overloaded_error"
        assert "shutting down" in found[-1]["message"]


def test_a_failing_engine_says_so(run_server, monkeypatch):
    server = run_server()

    def broken():
        raise RuntimeError("out of order")

    monkeypatch.setattr(server.engine, "step", broken)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(asked(client, stream=True))
        assert caught.value.body["type"] == "error"
        with pytest.raises(anthropic.APIStatusError) as caught:
            asked(client)
        assert caught.value.status_code == 503
        assert caught.value.body["type"] == "error"


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, "context"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"extra_body": {"top_p": 2}}, "top_p"),
        ({"stop_sequences": [""]}, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_named(client, fields, word, stream):
    with pytest.raises(anthropic.BadRequestError) as caught:
        asked(client, stream=stream, **fields)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert word in caught.value.body["error"]["message"]


def test_max_tokens_is_required(server):
    status, answer, _ = server.call("/v1/messages", {"messages": SAID})
    assert (status, answer) == (
        400,
        {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: this field is required."}},
    )


def test_an_unknown_model_is_refused(client):
    with pytest.raises(anthropic.NotFoundError, match="'claude-x'") as caught:
        asked(client, model="claude-x")
    assert caught.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="claude-x", messages=SAID)


def test_keys_are_checked(run_server):
    server = run_server(ServeSettings(port=0, api_keys=("secret",)))
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
        assert asked(client, max_tokens=2).usage.output_tokens == 2
    with anthropic.Anthropic(base_url=server.url, auth_token="secret", max_retries=0) as client:
        assert asked(client, max_tokens=2).usage.output_tokens == 2
    with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            asked(client)
        assert caught.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.count_tokens(model=MODEL, messages=SAID)


def test_a_body_that_is_not_json_is_refused(server):
    for body in (
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"messages": "\\ud800", "max_tokens": 1}',
        b"[" * 500,
        b'{"max_tokens": NaN}',
    ):
        status, answer, _ = server.call("/v1/messages", body, method="POST")
        assert status == 400, body
        assert answer["type"] == "error"
        assert answer["error"]["type"] == "invalid_request_error"


def test_unknown_routes_give_errors_in_the_same_shape(server):
    for path, status in (("/v1/messages", 405), ("/v1/messages/batches", 404)):
        told, answer, _ = server.call(path)
        assert told == status
        assert answer["type"] == "error"
        assert set(answer["error"]) == {"type", "message"}


# ---- whatever comes ----

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
VALID = [
    {"messages": SAID, "max_tokens": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 4, "stop_sequences": ["x"]},
    {
        "messages": SAID,
        "max_tokens": 2,
        "stream": True,
        "system": [{"type": "text", "text": "s"}],
        "metadata": {"user_id": "u"},
    },
    {"messages": [*SAID, {"role": "assistant", "content": "b"}], "max_tokens": 2, "system": "s", "stream": True},
    {
        "messages": SAID,
        "max_tokens": 2,
        "routing": True,
        "router_policy": {"boost": [{"expert": 3, "bias": 1.0}], "k": 2},
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "1"}]},
                    {"type": "tool_result", "tool_use_id": "t", "content": "1", "is_error": True},
                ],
            },
        ],
        "max_tokens": 2,
        "tools": [TOOL],
        "thinking": {"type": "disabled"},
    },
    {"messages": SAID, "max_tokens": 3, "tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}, "stream": True},
    {
        "messages": SAID,
        "max_tokens": 3,
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    },
    {"messages": SAID, "max_tokens": 3, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=mangled(VALID, sorted(MessagesRequest.model_fields)),
    path=st.sampled_from(["/v1/messages"] * 3 + ["/v1/messages/count_tokens"]),
)
def test_no_request_causes_a_5xx(server, body, path):
    status, answer, headers = server.call(path, encoded(body), method="POST")
    assert status < 500, answer
    if status != 200:
        assert answer["type"] == "error"
        assert set(answer["error"]) == {"type", "message"}
    elif headers["content-type"].startswith("text/event-stream"):
        assert answer.rstrip().endswith('data: {"type":"message_stop"}')
    else:
        assert "input_tokens" in answer or answer["type"] == "message"


@pytest.mark.parametrize("body", VALID)
def test_requests_used_for_mangling_are_valid(server, body):
    assert server.call("/v1/messages", body)[0] == 200
