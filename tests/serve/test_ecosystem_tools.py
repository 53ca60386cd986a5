"""Tools and structured output through LangChain, Anthropic's client and OpenAI's responses."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

MODEL = "olmoe-tiny"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    days: Annotated[int, Field(ge=1, le=14)]


SCHEMA = {**Weather.model_json_schema(), "additionalProperties": False}
ANTHROPIC_TOOL = {"name": "Weather", "description": "The weather.", "input_schema": SCHEMA}
RESPONSES_TOOL = {"type": "function", "name": "Weather", "parameters": SCHEMA, "strict": True}


# ---- LangChain ----


@pytest.fixture
def langchain(server):
    module = pytest.importorskip("langchain_openai")
    return module.ChatOpenAI(model=MODEL, base_url=server.url + "/v1", api_key="none", seed=1, max_retries=0)


def test_langchain_binds_tools(langchain):
    answer = langchain.bind_tools([Weather], tool_choice="required", parallel_tool_calls=False).invoke("Oslo?")
    (call,) = answer.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    assert answer.response_metadata["finish_reason"] == "tool_calls"


def test_langchain_streams_tools(langchain):
    bound = langchain.bind_tools([Weather], tool_choice="Weather")
    chunks = list(bound.stream("Oslo?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    (call,) = whole.tool_calls
    Weather.model_validate(call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(langchain, method):
    assert isinstance(langchain.with_structured_output(Weather, method=method).invoke("Oslo?"), Weather)


# ---- Anthropic ----


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "Weather"}]
)
def test_anthropic_tools(claude, choice):
    asked = [{"role": "user", "content": "Oslo?"}]
    values = {"model": MODEL, "max_tokens": 150, "tools": [ANTHROPIC_TOOL], "tool_choice": choice}
    message = claude.messages.create(messages=asked, **values)
    (block,) = message.content
    assert (block.type, block.name, message.stop_reason) == ("tool_use", "Weather", "tool_use")
    Weather.model_validate(block.input)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]}
    history = [*asked, {"role": "assistant", "content": message.content}, result]
    again = claude.messages.create(messages=history, model=MODEL, max_tokens=8, tools=[ANTHROPIC_TOOL])
    assert again.stop_reason in ("end_turn", "max_tokens", "tool_use")
    with claude.messages.stream(messages=asked, **values) as stream:
        (streamed,) = stream.get_final_message().content
    Weather.model_validate(streamed.input)


# ---- responses ----


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "Weather"}])
def test_responses_call_functions(client, choice):
    values = {"model": MODEL, "tools": [RESPONSES_TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.responses.create(input="Oslo?", **values)
    (item,) = answer.output
    assert (item.type, item.name, answer.status) == ("function_call", "Weather", "completed")
    Weather.model_validate(json.loads(item.arguments))
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    history = [{"role": "user", "content": "Oslo?"}, item.to_dict(), result]
    again = client.responses.create(input=history, model=MODEL, max_output_tokens=16, tools=[RESPONSES_TOOL])
    assert again.output


def test_responses_parse(client):
    answer = client.responses.parse(model=MODEL, input="Oslo?", text_format=Weather)
    assert isinstance(answer.output_parsed, Weather)


def test_responses_stream_calls(client):
    values = {"model": MODEL, "tools": [RESPONSES_TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(input="Oslo?", **values) as stream:
        events = list(stream)
    pieces = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    Weather.model_validate(json.loads(pieces))
