"""POST /v1/responses of a real server, through the openai package and without it."""

from __future__ import annotations

import asyncio
import threading

import openai
import pytest
from hypothesis import HealthCheck, given, settings

from mangled_bodies import encoded, mangled
from olmoe.runtime import peak_memory_bytes
from olmoe.serve.responses_models import ResponsesRequest
from olmoe.serve.state import ServeSettings

MODEL = "olmoe-tiny"
SAID = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat_of(server, messages=SAID, **fields):
    """What /v1/chat/completions answers."""
    status, answer, _ = server.call("/v1/chat/completions", {"messages": messages, "temperature": 0, **fields})
    assert status == 200, answer
    return answer


def asked(client, **fields):
    return client.responses.create(
        **{"model": MODEL, "input": SAID, "temperature": 0, "max_output_tokens": 24} | fields
    )


# ---- answers ----


def test_the_answer_equals_chat_completions(server, client):
    chat = chat_of(server, max_tokens=24)
    answer = asked(client)
    assert answer.output_text == chat["choices"][0]["message"]["content"] != ""
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == 24
    assert answer.usage.total_tokens == answer.usage.input_tokens + 24
    assert asked(client, input="def add(a, b):").output_text == answer.output_text


def test_instructions_are_a_system_message(server, client):
    chat = chat_of(server, [{"role": "system", "content": "Write Python."}, *SAID], max_tokens=24)
    answer = asked(client, instructions="Write Python.")
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    assert answer.instructions == "Write Python."


def test_sampling_equals_chat_completions(server, client):
    fields = {"temperature": 1.5, "top_p": 0.8, "seed": 11, "top_k": 30, "ignore_eos": True}
    chat = chat_of(server, max_tokens=24, **fields)
    answer = asked(client, temperature=1.5, top_p=0.8, extra_body={"seed": 11, "top_k": 30, "ignore_eos": True})
    assert answer.output_text == chat["choices"][0]["message"]["content"]


def test_a_stop_string_completes_a_response(server, client):
    text = asked(client).output_text
    answer = asked(client, extra_body={"stop": [text[3]]})
    assert answer.output_text == text[: text.index(text[3])]
    assert answer.status == "completed"
    assert answer.completed_at is not None
    assert answer.incomplete_details is None


def test_log_probabilities_equal_chat_completions(server, client):
    chat = chat_of(server, max_tokens=8, logprobs=True, top_logprobs=3)
    answer = asked(client, max_output_tokens=8, include=["message.output_text.logprobs"], top_logprobs=3)
    told = [each.to_dict() for each in answer.output[0].content[0].logprobs]
    assert told == chat["choices"][0]["logprobs"]["content"]
    assert len(told) == 8
    assert [len(each["top_logprobs"]) for each in told] == [3] * 8
    assert asked(client).output[0].content[0].logprobs == []


@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_partial_characters_have_log_probabilities_too(server, client, seed):
    fields = {"temperature": 1.9, "seed": seed, "ignore_eos": True}
    chat = chat_of(server, max_tokens=60, logprobs=True, **fields)["choices"][0]
    include = ["message.output_text.logprobs"]
    fields.pop("temperature")
    answer = asked(client, max_output_tokens=60, include=include, temperature=1.9, extra_body=fields)
    told = [each.to_dict() for each in answer.output[0].content[0].logprobs]
    assert told == chat["logprobs"]["content"]
    assert len(told) == 60
    assert answer.output_text == chat["message"]["content"]


def test_routing_equals_chat_completions(server, client):
    policy = {"ban": [{"layer": 0, "expert": 5}], "k": 4}
    chat = chat_of(server, max_tokens=8, routing=True, router_policy=policy)
    answer = asked(client, max_output_tokens=8, extra_body={"routing": True, "router_policy": policy})
    assert answer.routing == chat["choices"][0]["routing"]
    assert answer.routing["tokens"] == 8


def test_a_repeated_prompt_is_served_from_the_cache(client):
    said = "one two three four five six seven " * 20
    asked(client, input=said, max_output_tokens=1)
    usage = asked(client, input=said, max_output_tokens=1).usage
    assert 0 < usage.input_tokens_details.cached_tokens < usage.input_tokens


# ---- streams ----


def test_a_stream_has_the_same_content(server, client):
    whole = asked(client, include=["message.output_text.logprobs"])
    with client.responses.stream(
        model=MODEL, input=SAID, temperature=0, max_output_tokens=24, include=["message.output_text.logprobs"]
    ) as stream:
        events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * len(deltas),
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert [x.to_dict()["logprob"] for e in deltas for x in e.logprobs] == [
        x.logprob for x in whole.output[0].content[0].logprobs
    ]
    final = events[-1].response
    assert final.output[0].content[0].text == whole.output_text
    assert final.usage.output_tokens == 24
    assert client.responses.retrieve(final.id).to_dict()["output"] == final.to_dict()["output"]


def test_events_have_names_and_there_is_no_done(server):
    status, text, headers = server.call("/v1/responses", {"input": "a", "max_output_tokens": 2, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names[0] == "response.created"
    assert names[-1] in ("response.incomplete", "response.completed")
    assert "[DONE]" not in text
    assert text.count("\ndata: ") == len(names)


def test_concurrent_requests_get_the_same_as_alone(server):
    said = [f"Number {i}:" for i in range(6)]

    async def one(client, text):
        parts = []
        async with client.responses.stream(model=MODEL, input=text, temperature=0, max_output_tokens=16) as stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    parts.append(event.delta)
        return "".join(parts)

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, text) for text in said))
            alone = [
                (
                    await client.responses.create(model=MODEL, input=text, temperature=0, max_output_tokens=16)
                ).output_text
                for text in said
            ]
        return together, alone

    together, alone = asyncio.run(run())
    assert together == alone


def test_a_disconnected_clients_work_is_aborted(server, client):
    stream = client.responses.create(
        model=MODEL, input="x", stream=True, max_output_tokens=400, extra_body={"ignore_eos": True}
    )
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    stream.close()
    assert server.idle()


def test_a_stopping_server_fails_its_responses(run_server):
    server = run_server()
    events = []
    begun = threading.Event()

    def read():
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for event in client.responses.create(
                model=MODEL, input="x", stream=True, max_output_tokens=490, extra_body={"ignore_eos": True}
            ):
                events.append(event)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    server.stop()
    server.stop()
    reader.join(20)
    last = events[-1]
    assert last.type == "response.failed" or last.response.usage.output_tokens == 490  # it was faster
    if last.type == "response.failed":
        assert last.response.error.code == "server_error"
        assert "shutting down" in last.response.error.message or "cancelled" in last.response.error.message


def test_a_failing_engine_fails_its_responses(run_server, monkeypatch):
    server = run_server()

    def broken():
        raise RuntimeError("out of order")

    monkeypatch.setattr(server.engine, "step", broken)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        events = list(asked(client, stream=True))
        assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
        assert events[-1].response.error.code == "server_error"
        assert events[-1].response.output == []
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(events[-1].response.id)
        with pytest.raises(openai.InternalServerError) as caught:
            asked(client)
        assert caught.value.status_code == 503


# ---- conversations ----


def test_a_conversation_continues_from_a_response_id(server, client):
    first = asked(client, input="def add(a, b):", instructions="Write Python.")
    second = asked(client, input="Again", previous_response_id=first.id)
    history = [*SAID, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Again"}]
    assert second.output_text == chat_of(server, history, max_tokens=24)["choices"][0]["message"]["content"]
    assert second.previous_response_id == first.id
    third = asked(client, input="And again", previous_response_id=second.id, instructions="Be brief.")
    history = [
        {"role": "system", "content": "Be brief."},
        *history,
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "And again"},
    ]
    assert third.output_text == chat_of(server, history, max_tokens=24)["choices"][0]["message"]["content"]


def test_client_side_history_gives_the_same_conversation(client):
    first = asked(client, store=False)
    items = [*SAID, *[item.to_dict() for item in first.output], {"role": "user", "content": "Again"}]
    kept = asked(client, input=items)
    stored = asked(client)
    assert kept.output_text == asked(client, input="Again", previous_response_id=stored.id).output_text
    referred = [*SAID, {"type": "item_reference", "id": stored.output[0].id}, {"role": "user", "content": "Again"}]
    assert asked(client, input=referred).output_text == kept.output_text


def test_stored_responses_can_be_read_and_deleted(client):
    answer = asked(client, metadata={"topic": "sums"})
    again = client.responses.retrieve(answer.id)
    assert again.to_dict() == answer.to_dict()
    assert again.metadata == {"topic": "sums"}
    client.responses.delete(answer.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="There is no response"):
            call(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        asked(client, previous_response_id=answer.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_responses_are_not_stored_if_store_is_false(client):
    answer = asked(client, store=False)
    assert answer.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_input_items_are_paginated(client):
    first = asked(client, input=[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    second = asked(client, input="c", previous_response_id=first.id)
    texts = [item.content[0].text for item in client.responses.input_items.list(second.id, limit=2)]  # reads on itself
    assert texts == ["c", first.output_text, "b", "a"]
    page = client.responses.input_items.list(second.id, order="asc", limit=1)
    assert [item.content[0].text for item in page.data] == ["a"]
    assert page.has_more
    for query in ({"limit": 0}, {"limit": 101}, {"after": "msg_0"}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.input_items.list(second.id, **query)
        assert caught.value.param == next(iter(query))


def test_a_conversation_that_is_too_long_is_truncated_at_its_beginning(server, client):
    said = [{"role": "user", "content": f"Message {i}: " + "word " * 30} for i in range(40)]
    system = {"role": "system", "content": "Count."}
    with pytest.raises(openai.BadRequestError, match="the model's context ends") as caught:
        asked(client, input=[system, *said])
    assert caught.value.param == "input"
    answer = asked(client, input=[system, *said], truncation="auto")
    assert answer.truncation == "auto"
    most = server.state.context_length - 24
    lengths = [server.call("/tokenize", {"messages": [system, *said[i:]]})[1]["count"] for i in range(len(said))]
    first = next(i for i, length in enumerate(lengths) if length <= most)
    assert 0 < first < len(said) - 1
    assert answer.usage.input_tokens == lengths[first]
    chat = chat_of(server, [system, *said[first:]], max_tokens=24)
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    assert asked(client, input=SAID, truncation="auto").usage.input_tokens == asked(client).usage.input_tokens


def test_truncation_handles_any_number_of_messages(server):
    """Building all truncated forms at once would take 200 million messages."""
    said = [{"role": "user", "content": "a"}] * 20_000
    before = peak_memory_bytes()
    body = {"input": said, "truncation": "auto", "max_output_tokens": 4, "store": False}
    status, answer, _ = server.call("/v1/responses", body)
    assert (status, answer["usage"]["output_tokens"] <= 4) == (200, True)
    assert peak_memory_bytes() - before < 2**28


def test_input_tokens_are_counted(client):
    answer = asked(client, instructions="Write Python.")
    count = client.responses.input_tokens.count(model=MODEL, input=SAID, instructions="Write Python.")
    assert count.input_tokens == answer.usage.input_tokens
    more = client.responses.input_tokens.count(model=MODEL, input="Again", previous_response_id=answer.id)
    assert more.input_tokens == asked(client, input="Again", previous_response_id=answer.id).usage.input_tokens


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": "x " * 5000}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"stop": 3}}, "stop"),
        ({"extra_body": {"router_policy": {"ban": [{"expert": 999}]}}}, "router_policy.ban[0].expert"),
        ({"extra_body": {"bad_words": [" "]}}, "bad_words"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_named(client, fields, param, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        asked(client, stream=stream, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_refused(client):
    with pytest.raises(openai.NotFoundError) as caught:
        asked(client, model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_an_alias_is_answered_under_its_name(run_server):
    server = run_server()
    server.state.aliases = ("gpt-4o", "claude-x")
    given = {"model": "gpt-4o", "input": "a", "max_output_tokens": 1}
    assert server.call("/v1/responses", given)[1]["model"] == "gpt-4o"
    given = {"model": "claude-x", "messages": SAID, "max_tokens": 1}
    assert server.call("/v1/messages", given)[1]["model"] == "claude-x"
    assert server.call("/v1/messages", given | {"model": ""})[1]["model"] == MODEL


def test_keys_cannot_see_each_others_responses(run_server):
    server = run_server(ServeSettings(port=0, api_keys=("one", "two"), share_prefixes=True))

    def of(key):
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    with of("one") as one, of("two") as two, of("three") as three:
        answer = asked(one)
        assert one.responses.retrieve(answer.id).id == answer.id
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError):
            asked(two, previous_response_id=answer.id)
        with pytest.raises(openai.AuthenticationError):
            asked(three)
        with pytest.raises(openai.AuthenticationError):
            three.responses.retrieve(answer.id)


def test_the_openapi_description_has_the_routes(server):
    description = server.call("/openapi.json")[1]
    assert set(description["paths"]["/v1/responses/{id}"]) == {"get", "delete"}
    query = description["paths"]["/v1/responses/{id}/input_items"]["get"]["parameters"]
    assert [each["name"] for each in query] == ["id", "order", "after", "limit"]
    for path in ("/v1/responses", "/v1/responses/input_tokens", "/v1/messages", "/v1/messages/count_tokens"):
        reference = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.removeprefix("#/components/schemas/") in description["components"]["schemas"]


# ---- whatever comes ----

FUNCTION = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
VALID = [
    {"input": "a", "max_output_tokens": 2, "temperature": 0.5, "top_p": 0.5, "seed": 1, "stop": ["x"], "top_k": 4},
    {
        "input": "a",
        "max_output_tokens": 3,
        "stream": True,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    },
    {
        "input": SAID,
        "max_output_tokens": 2,
        "routing": True,
        "router_policy": {"ban": [{"layer": 0, "expert": 3}], "k": 2},
    },
    {
        "input": "a",
        "max_output_tokens": 2,
        "stream": True,
        "metadata": {"a": "b"},
        "instructions": "b",
        "logit_bias": {"7": 1},
    },
    {
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "user", "content": "b"},
            {"type": "reasoning", "id": "rs", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        ],
        "max_output_tokens": 2,
        "truncation": "auto",
        "store": False,
    },
    {
        "input": "a",
        "max_output_tokens": 3,
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": FUNCTION, "strict": True}],
        "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": False,
    },
    {
        "input": "a",
        "max_output_tokens": 3,
        "tools": [{"type": "function", "name": "f", "parameters": FUNCTION}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "stream": True,
    },
    {
        "input": "a",
        "max_output_tokens": 3,
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": FUNCTION, "strict": True},
            "verbosity": "medium",
        },
    },
    {"input": "a", "max_output_tokens": 3, "text": {"format": {"type": "json_object"}}, "reasoning": {"effort": None}},
]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=mangled(VALID, sorted(ResponsesRequest.model_fields)))
def test_no_request_causes_a_5xx(server, body):
    status, answer, headers = server.call("/v1/responses", encoded(body), method="POST")
    assert status < 500, answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    elif headers["content-type"].startswith("text/event-stream"):
        assert answer.count("event: response.completed\n") + answer.count("event: response.incomplete\n") == 1
        assert '"type":"error"' not in answer
    else:
        assert answer["status"] in ("completed", "incomplete")


@pytest.mark.parametrize("body", VALID)
def test_requests_used_for_mangling_are_valid(server, body):
    assert server.call("/v1/responses", body)[0] == 200
