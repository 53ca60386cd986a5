"""Tools and schemas over POST /v1/responses, through the openai package: calls, their results, parsed answers."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

MODEL = "olmoe-tiny"
# A few dozen tokens at most, so that even a nonsensical model finishes them.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "name": "weather", "description": "The weather.", "parameters": PARAMETERS, "strict": True},
    {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": False},
]
WEATHER = {"type": "function", "name": "weather"}


class Forecast(BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(client, **fields):
    given = {
        "model": MODEL,
        "input": "The weather in Rome?",
        "temperature": 0,
        "max_output_tokens": 200,
        "tools": TOOLS,
    }
    return client.responses.create(**given | fields)


def of_weather(arguments):
    found = json.loads(arguments)
    assert set(found) == {"city", "unit"}
    assert found["city"] in ("Paris", "Rome")
    return found


def test_functions_can_be_called(client):
    answer = asked(client, tool_choice=WEATHER)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    of_weather(call.arguments)
    assert call.id.startswith("fc_")
    assert call.call_id
    assert answer.status == "completed"
    assert answer.tools[0].parameters == PARAMETERS
    assert answer.tool_choice.name == "weather"


def test_a_stream_has_the_same_call(client):
    whole = asked(client, tool_choice=WEATHER).output[0]
    with client.responses.stream(
        model=MODEL,
        input="The weather in Rome?",
        temperature=0,
        max_output_tokens=200,
        tools=TOOLS,
        tool_choice=WEATHER,
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds == [
        "created", "in_progress", "output_item.added", *["function_call_arguments.delta"] * len(deltas),
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(e.delta for e in deltas) == whole.arguments == events[-3].arguments
    assert final.output[0].arguments == whole.arguments
    assert events[2].item.name == "weather"
    assert events[2].item.arguments == ""


def test_required_forces_one_call_and_none_forbids_all(client):
    assert asked(client, tool_choice="required").output[0].name in ("weather", "clock")
    assert [item.type for item in asked(client, tool_choice="none", max_output_tokens=8).output] == ["message"]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    assert asked(client, tool_choice=allowed).output[0].name == "clock"


def test_a_call_can_be_sent_back_with_its_result(client):
    first = asked(client, tool_choice=WEATHER)
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "20 degrees"}
    asked_on = asked(client, input=[result], previous_response_id=first.id, tool_choice="none", max_output_tokens=16)
    items = [{"role": "user", "content": "The weather in Rome?"}, first.output[0].to_dict(), result]
    kept = asked(client, input=items, tool_choice="none", max_output_tokens=16)
    assert kept.output_text == asked_on.output_text
    before = asked(client, tool_choice="none", max_output_tokens=1)
    assert kept.usage.input_tokens == asked_on.usage.input_tokens > before.usage.input_tokens + 20


def test_arguments_cut_by_the_limit_are_incomplete(client):
    answer = asked(client, tool_choice=WEATHER, max_output_tokens=6)
    assert answer.status == "incomplete"
    assert all(item.status == "incomplete" for item in answer.output[-1:])


def test_answers_are_parsed(client):
    answer = client.responses.parse(
        model=MODEL, input="Sunny in Rome?", temperature=0, max_output_tokens=200, text_format=Forecast
    )
    assert isinstance(answer.output_parsed, Forecast)
    assert answer.text.format.type == "json_schema"
    with client.responses.stream(
        model=MODEL, input="Sunny in Rome?", temperature=0, max_output_tokens=200, text_format=Forecast
    ) as stream:
        assert stream.get_final_response().output_parsed == answer.output_parsed


def test_answers_are_parsed_asynchronously(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.responses.parse(
                model=MODEL, input="Sunny?", temperature=1, max_output_tokens=200, text_format=Forecast
            )
            call = await asked(client, tool_choice=WEATHER)
            return answer.output_parsed, call.output[0].arguments

    parsed, arguments = asyncio.run(run())
    assert isinstance(parsed, Forecast)
    of_weather(arguments)


def test_any_json_object_can_be_requested(client):
    answer = asked(client, tools=[], text={"format": {"type": "json_object"}}, temperature=1, max_output_tokens=400)
    if answer.status == "completed":
        assert isinstance(json.loads(answer.output_text), dict)
    assert answer.output_text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "name": "nothing"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tools": [TOOLS[0] | {"parameters": {"type": "nothing"}}], "tool_choice": "required"}, "tools"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}}}, "tools": []},
            "text.format",
        ),
    ],
)
def test_mistakes_are_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        asked(client, **fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)
