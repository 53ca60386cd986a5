"""Tools and schemas over POST /v1/messages, through the anthropic package: uses, their results, parsed answers."""

from __future__ import annotations

import asyncio
from typing import Literal

import anthropic
import pytest
from pydantic import BaseModel

MODEL = "olmoe-tiny"
SAID = [{"role": "user", "content": "The weather in Rome?"}]
# A few dozen tokens at most, so that even a nonsensical model finishes them.
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"name": "weather", "description": "The weather.", "input_schema": SCHEMA},
    {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
]
WEATHER = {"type": "tool", "name": "weather"}
GREEDY = {"temperature": 0}


class Forecast(BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def asked(client, **fields):
    given = {"model": MODEL, "messages": SAID, "max_tokens": 200, "tools": TOOLS, "extra_body": GREEDY}
    return client.messages.create(**given | fields)


def test_tools_can_be_used(client):
    message = asked(client, tool_choice=WEATHER)
    (use,) = message.content
    assert (use.type, use.name) == ("tool_use", "weather")
    assert use.id.startswith("toolu_")
    assert set(use.input) == {"city", "unit"}
    assert use.input["city"] in ("Paris", "Rome")
    assert message.stop_reason == "tool_use"


def test_a_stream_has_the_same_tool_use(client):
    whole = asked(client, tool_choice=WEATHER).content[0]
    with client.messages.stream(
        model=MODEL, messages=SAID, max_tokens=200, tools=TOOLS, tool_choice=WEATHER, extra_body=GREEDY
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert "input_json" in kinds
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert final.content[0].input == whole.input
    assert final.stop_reason == "tool_use"


def test_any_forces_one_tool_and_none_forbids_all(client):
    assert asked(client, tool_choice={"type": "any"}).content[0].name in ("weather", "clock")
    answer = asked(client, tool_choice={"type": "none"}, max_tokens=8)
    assert [block.type for block in answer.content] == ["text"]


def test_a_tool_use_can_be_sent_back_with_its_result(client):
    first = asked(client, tool_choice=WEATHER)
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "20 degrees"}
    said = [*SAID, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = asked(client, messages=said, tool_choice={"type": "none"}, max_tokens=16)
    assert second.content[0].type == "text"
    count = client.messages.count_tokens(model=MODEL, messages=said, tools=TOOLS, tool_choice={"type": "none"})
    assert count.input_tokens == second.usage.input_tokens + second.usage.cache_read_input_tokens
    assert count.input_tokens > client.messages.count_tokens(model=MODEL, messages=SAID).input_tokens + 20


def test_tools_count_towards_input_tokens(client):
    plain = client.messages.count_tokens(model=MODEL, messages=SAID).input_tokens
    assert client.messages.count_tokens(model=MODEL, messages=SAID, tools=TOOLS).input_tokens > plain


def test_a_tool_use_cut_by_the_limit_is_reported(client):
    message = asked(client, tool_choice=WEATHER, max_tokens=6)
    assert message.stop_reason == "max_tokens"


def test_answers_are_parsed(client):
    message = client.messages.parse(
        model=MODEL, messages=SAID, max_tokens=200, output_format=Forecast, extra_body=GREEDY
    )
    assert isinstance(message.parsed_output, Forecast)


def test_concurrent_requests_with_tools_get_equal_answers(server):
    async def run():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(asked(client, tool_choice=WEATHER) for _ in range(4)))

    inputs = [message.content[0].input for message in asyncio.run(run())]
    assert inputs == [inputs[0]] * 4


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tool_choice": {"type": "tool", "name": "nothing"}}, "nothing"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool"),
        ({"tools": [{"name": "f", "input_schema": {"type": "nothing"}}], "tool_choice": {"type": "any"}}, "tools"),
    ],
)
def test_mistakes_are_named(client, fields, word):
    with pytest.raises(anthropic.BadRequestError) as caught:
        asked(client, **fields)
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert word in caught.value.body["error"]["message"]
