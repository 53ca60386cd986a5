"""Chat events as a response: every event is known to the openai package and in the documented order."""

from __future__ import annotations

import json

import numpy as np
import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from olmoe.engine.request import Routing, TokenLogprob
from olmoe.serve.chat_run import Finished, TextDelta, ToolCallDelta, Usage
from olmoe.serve.dialects import parse
from olmoe.serve.responses_models import ResponsesRequest
from olmoe.serve.responses_output import ResponseWriter, output_items, response_object

KNOWN = TypeAdapter(ResponseStreamEvent)
USAGE = Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=8)


def describe(logprob):
    token = {"token": str(logprob.token_id), "bytes": [48], "logprob": logprob.logprob}
    return token | {"top_logprobs": [{"token": str(i), "bytes": [48], "logprob": x} for i, x in logprob.top.items()]}


def encode(routing):
    return {"tokens": len(routing)}


def text(value, *, ids=(1,), routing=()):
    return TextDelta(0, value, [TokenLogprob(i, -0.5, {i: -0.5, 9: -1.5}) for i in ids], list(ids), list(routing))


def written(news, *, logprobs=False, routing=False, **body):
    """The stream events for `news`, and the final response. Each event is checked by openai's types."""
    request = parse(ResponsesRequest, {"input": "x", **body})
    writer = ResponseWriter(
        response_object(request, "m"), describe=describe, encode=encode, logprobs=logprobs, routing=routing
    )
    events = list(writer.start())
    for each in news:
        events += writer.write(each)
    events += writer.end()
    for event in events:
        KNOWN.validate_python(json.loads(json.dumps(event)), strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == writer.response
    Response.model_validate(json.loads(json.dumps(writer.response)), strict=True)
    return events, writer.response


def kinds(events):
    return [event["type"].removeprefix("response.") for event in events]


MESSAGE = ["output_item.added", "content_part.added"]
MESSAGE_END = ["output_text.done", "content_part.done", "output_item.done"]


def test_a_text_is_one_message():
    events, response = written([text("Hel"), text(""), text("lo"), Finished(0, "stop"), USAGE])
    assert kinds(events) == [
        "created", "in_progress", *MESSAGE, "output_text.delta", "output_text.delta", *MESSAGE_END, "completed",
    ]  # fmt: skip
    assert [e["response"]["status"] for e in events[:2]] == ["in_progress"] * 2
    assert events[0]["response"]["output"] == []  # as it was then
    added, done = events[2]["item"], events[-2]["item"]
    assert (added["status"], added["content"]) == ("in_progress", [])
    assert done == response["output"][0]
    assert {e["item_id"] for e in events if "item_id" in e} == {done["id"]} == {added["id"]}
    assert response["status"] == "completed"
    assert response["completed_at"] >= response["created_at"]
    assert done["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert events[6]["text"] == "Hello"
    assert response["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    }


def test_text_and_two_calls_are_three_items():
    news = [
        text("I add."),
        ToolCallDelta(0, 0, "call_a", "add", ""),
        ToolCallDelta(0, 0, None, None, '{"a":'),
        ToolCallDelta(0, 0, None, None, "1}"),
        ToolCallDelta(0, 1, "call_b", "mul", "{}"),
        Finished(0, "tool_calls"),
        USAGE,
    ]
    events, response = written(news)
    assert kinds(events) == [
        "created", "in_progress", *MESSAGE, "output_text.delta", *MESSAGE_END,
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    first, second = response["output"][1:]
    assert first == {
        "id": first["id"],
        "type": "function_call",
        "status": "completed",
        "call_id": "call_a",
        "name": "add",
        "arguments": '{"a":1}',
    }
    assert (second["call_id"], second["name"], second["arguments"]) == ("call_b", "mul", "{}")
    assert first["id"].startswith("fc_")
    assert first["id"] != second["id"]
    assert [e["output_index"] for e in events if e["type"].endswith("output_item.added")] == [0, 1, 2]
    assert response["status"] == "completed"
    assert [item.type for item in output_items(response)] == ["message", "function_call", "function_call"]


def test_the_openai_package_assembles_the_events():
    news = [text("I "), text("add."), ToolCallDelta(0, 0, "call_a", "add", '{"a":1}'), Finished(0, "tool_calls"), USAGE]
    events, response = written(news)
    state = ResponseStreamState(input_tools=[], text_format=omit)
    seen = [each for event in events for each in state.handle_event(KNOWN.validate_python(event))]
    assert [e.snapshot for e in seen if e.type == "response.output_text.delta"] == ["I ", "I add."]
    final = state._completed_response
    assert final.output_text == "I add."
    assert final.id == response["id"]


def test_reaching_the_limit_is_incomplete():
    events, response = written([text("Hel"), Finished(0, "length"), USAGE])
    assert kinds(events)[-2:] == ["output_item.done", "incomplete"]
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    events, response = written([ToolCallDelta(0, 0, "c", "f", '{"a'), Finished(0, "length"), USAGE])
    assert response["output"][0]["arguments"] == '{"a'
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("news", [[], [text("Hel")]])
@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_an_error_fails_the_response(news, reason):
    events, response = written([*news, Finished(0, reason, "The runner broke." if reason == "error" else None)])
    assert kinds(events)[-1] == "failed"
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert response["error"]["message"] == ("The runner broke." if reason == "error" else "The request was cancelled.")
    assert [item["status"] for item in response["output"]] == ["incomplete"] * len(news)


def test_a_stream_that_ends_without_a_final_event_has_failed():
    events, response = written([text("Hel")])
    assert kinds(events)[-2:] == ["output_item.done", "failed"]
    assert response["error"]["message"] == "The answer broke off."


def test_an_empty_answer_is_an_empty_message():
    events, response = written([text("", ids=(7,)), Finished(0, "stop"), USAGE])
    assert kinds(events) == ["created", "in_progress", *MESSAGE, *MESSAGE_END, "completed"]
    assert response["output"][0]["content"][0]["text"] == ""


def test_log_probabilities_come_with_their_text():
    events, response = written([text("He", ids=(1, 2)), text("y", ids=(3,)), Finished(0, "stop"), USAGE], logprobs=True)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [[t["token"] for t in e["logprobs"]] for e in deltas] == [["1", "2"], ["3"]]
    tokens = response["output"][0]["content"][0]["logprobs"]
    assert tokens == [t for e in deltas for t in e["logprobs"]]
    assert tokens[0] == describe(TokenLogprob(1, -0.5, {1: -0.5, 9: -1.5}))


def test_a_token_with_delayed_text_is_reported_with_it():
    one = Routing(np.zeros((2, 2), np.int16), np.ones((2, 2), np.float32))
    news = [text("", ids=(1,), routing=[one]), text("", ids=(2,), routing=[one]), text("é", ids=(3,), routing=[one])]
    events, response = written([*news, Finished(0, "stop"), USAGE], logprobs=True, routing=True)
    (delta,) = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [token["token"] for token in delta["logprobs"]] == ["1", "2", "3"]
    assert delta["routing"] == response["routing"] == {"tokens": 3}
    assert response["output"][0]["content"][0]["logprobs"] == delta["logprobs"]


def test_tokens_without_text_are_reported_too():
    events, response = written([text("", ids=(7,)), Finished(0, "stop"), USAGE], logprobs=True)
    assert kinds(events)[4:6] == ["output_text.delta", "output_text.done"]
    assert [token["token"] for token in response["output"][0]["content"][0]["logprobs"]] == ["7"]


def test_tokens_of_a_call_are_not_counted_as_the_following_text():
    call = ToolCallDelta(0, 0, "call_a", "add", "{}")
    news = [text("", ids=(1,)), call, text("", ids=(2,)), text("b", ids=(3,)), Finished(0, "tool_calls"), USAGE]
    _, response = written(news, logprobs=True)
    assert [item["type"] for item in response["output"]] == ["function_call", "message"]
    assert [token["token"] for token in response["output"][1]["content"][0]["logprobs"]] == ["3"]


def test_routing_comes_with_each_delta_and_complete_at_the_end():
    one = Routing(np.zeros((2, 2), np.int16), np.ones((2, 2), np.float32))
    news = [
        text("a", routing=[one]),
        text("", routing=[one]),
        text("b", routing=[one, one]),
        Finished(0, "stop"),
        USAGE,
    ]
    events, response = written(news, routing=True)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [(e["delta"], e["routing"]) for e in deltas] == [
        ("a", {"tokens": 1}),
        ("", {"tokens": 1}),
        ("b", {"tokens": 2}),
    ]
    assert response["routing"] == {"tokens": 4}


def test_a_response_echoes_the_request():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    _, response = written(
        [Finished(0, "stop"), USAGE],
        instructions="Be brief.",
        metadata={"a": "b"},
        tools=[tool],
        tool_choice={"type": "function", "name": "f"},
        text={"format": form},
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.25,
        parallel_tool_calls=False,
        truncation="auto",
        user="u",
        store=False,
        previous_response_id="resp_0",
    )
    assert response["instructions"] == "Be brief."
    assert response["metadata"] == {"a": "b"}
    assert response["tools"][0]["name"] == "f"
    assert response["tool_choice"] == {"type": "function", "name": "f"}
    assert response["text"]["format"] == form
    assert (response["max_output_tokens"], response["temperature"], response["top_p"]) == (9, 0.5, 0.25)
    assert response["parallel_tool_calls"] is False
    assert response["truncation"] == "auto"
    assert response["previous_response_id"] == "resp_0"
    assert response["store"] is False
    assert response["model"] == "m"
