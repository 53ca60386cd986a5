"""Chat events as a message: every event is known to the anthropic package and in the documented order."""

from __future__ import annotations

import json

import numpy as np
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from olmoe.engine.request import Routing
from olmoe.serve.chat_run import Finished, TextDelta, ToolCallDelta, Usage
from olmoe.serve.messages_output import MessageWriter, message_object

KNOWN = TypeAdapter(RawMessageStreamEvent)
USAGE = Usage(prompt_tokens=10, completion_tokens=4, cached_tokens=8)


def text(value, routing=()):
    return TextDelta(0, value, [], [1], list(routing))


def written(news, *, max_tokens=4, routing=False):
    """The stream events for `news`, and the final message; anthropic's package must read the same."""
    writer = MessageWriter(
        message_object("m"), max_tokens=max_tokens, encode=lambda each: {"tokens": len(each)}, routing=routing
    )
    events = list(writer.start())
    for each in news:
        events += writer.write(each)
    events += writer.end()
    events = json.loads(json.dumps(events))
    read, buffers = None, {}
    for event in events:
        if event["type"] != "ping":
            known = KNOWN.validate_python(event, strict=True)
            read = accumulate_event(event=known, current_snapshot=read, json_bufs=buffers)
    Message.model_validate(writer.message, strict=True)
    told = {key: value for key, value in read.to_dict().items() if key in writer.message}
    assert told == {key: value for key, value in writer.message.items() if key != "routing"}
    return events, writer


def kinds(events):
    return [event["type"].removeprefix("content_block_") for event in events]


START = ["message_start", "ping"]
END = ["message_delta", "message_stop"]


def test_a_text_is_one_block():
    events, writer = written([text("Hel"), text(""), text("lo"), Finished(0, "stop"), USAGE])
    assert kinds(events) == [*START, "start", "delta", "delta", "stop", *END]
    assert events[0]["message"]["content"] == []
    assert events[2]["content_block"] == {"type": "text", "text": ""}
    assert [e["delta"]["text"] for e in events[3:5]] == ["Hel", "lo"]
    assert events[-2] == {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {
            "input_tokens": 2,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 8,
            "output_tokens": 4,
        },
    }
    assert writer.message["content"] == [{"type": "text", "text": "Hello"}]


def test_text_and_two_tool_uses_are_three_blocks():
    news = [
        text("I add."),
        ToolCallDelta(0, 0, "call_a", "add", ""),
        ToolCallDelta(0, 0, None, None, '{"a": '),
        ToolCallDelta(0, 0, None, None, "1}"),
        ToolCallDelta(0, 1, "call_b", "mul", "{}"),
        Finished(0, "tool_calls"),
        USAGE,
    ]
    events, writer = written(news)
    assert kinds(events) == [
        *START, "start", "delta", "stop", "start", "delta", "delta", "stop", "start", "delta", "stop", *END,
    ]  # fmt: skip
    assert [e["index"] for e in events if "index" in e] == [0] * 3 + [1] * 4 + [2] * 3
    assert events[5]["content_block"] == {"type": "tool_use", "id": "toolu_a", "name": "add", "input": {}}
    assert events[6]["delta"] == {"type": "input_json_delta", "partial_json": '{"a": '}
    assert writer.message["content"] == [
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "toolu_a", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_b", "name": "mul", "input": {}},
    ]
    assert writer.message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("finished", "max_tokens", "reason", "sequence"),
    [
        (Finished(0, "stop"), 4, "end_turn", None),
        (Finished(0, "stop", stop_string="END"), 4, "stop_sequence", "END"),
        (Finished(0, "stop", stop_string=17), 4, "end_turn", None),
        (Finished(0, "length"), 4, "max_tokens", None),
        (Finished(0, "length"), 5, "model_context_window_exceeded", None),
        (Finished(0, "tool_calls"), 4, "tool_use", None),
    ],
)
def test_the_stop_reason_says_why_a_message_ended(finished, max_tokens, reason, sequence):
    events, writer = written([text("a"), finished, USAGE], max_tokens=max_tokens)
    assert (writer.message["stop_reason"], writer.message["stop_sequence"]) == (reason, sequence)
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_required_tool_use_is_reported_as_tool_use():
    _, writer = written([ToolCallDelta(0, 0, "call_a", "add", "{}"), Finished(0, "stop"), USAGE])
    assert writer.message["stop_reason"] == "tool_use"


def test_an_empty_answer_is_one_empty_text_block():
    events, writer = written([text(""), Finished(0, "stop"), USAGE])
    assert kinds(events) == [*START, "start", "stop", *END]
    assert writer.message["content"] == [{"type": "text", "text": ""}]


def test_incomplete_arguments_are_reported():
    news = [ToolCallDelta(0, 0, "call_a", "add", '{"a": "xy'), Finished(0, "length"), USAGE]
    writer = MessageWriter(message_object("m"), max_tokens=4, encode=len)
    for each in news:
        list(writer.write(each))
    list(writer.end())
    assert writer.message["content"][0]["input"] == {}
    assert writer.message["stop_reason"] == "max_tokens"


def test_routing_comes_with_each_delta_and_complete_at_the_end():
    one = Routing(np.zeros((2, 2), np.int16), np.ones((2, 2), np.float32))
    news = [text("", [one]), text("a", [one]), text("", [one]), text("b", [one, one]), Finished(0, "stop"), USAGE]
    events, writer = written(news, routing=True)
    deltas = [e for e in events if e["type"] == "content_block_delta"]
    assert [e["routing"]["tokens"] for e in deltas] == [2, 1, 2]
    assert events[-2]["routing"] == writer.message["routing"] == {"tokens": 5}
