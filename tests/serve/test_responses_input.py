"""POST /v1/responses as a chat request."""

from __future__ import annotations

import pytest

from olmoe.serve.dialects import parse
from olmoe.serve.errors import ApiError
from olmoe.serve.responses_input import (
    chat_body,
    chat_messages,
    cuts,
    input_items,
    refuse_what_we_lack,
    resolved,
    shortened,
)
from olmoe.serve.responses_models import Message, ResponsesRequest


def translated(**body):
    request = parse(ResponsesRequest, body)
    refuse_what_we_lack(request)
    return chat_body(request, input_items(request))


CALL = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a":1}', "id": "fc_1"}
TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}


def test_a_text_becomes_a_user_message():
    assert translated(input="Hello", model="m") == {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def test_instructions_come_first_and_developer_means_system():
    assert translated(
        input=[{"role": "developer", "content": "b"}, {"role": "user", "content": "c"}], instructions="a"
    )["messages"] == [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c"},
    ]


def test_items_become_messages():
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me ", "annotations": []},
                                          {"type": "output_text", "text": "add."}], "type": "message", "id": "msg_1"},
        CALL,
        CALL | {"call_id": "call_2", "name": "mul"},
        {"type": "function_call_output", "call_id": "call_1", "output": "2"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "1"}]},
        CALL | {"call_id": "call_3"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]  # fmt: skip

    def call(name, of):
        return {"id": of, "type": "function", "function": {"name": name, "arguments": '{"a":1}'}}

    assert translated(input=items)["messages"] == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Let me add.", "tool_calls": [call("add", "call_1"), call("mul", "call_2")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "tool", "tool_call_id": "call_2", "content": "1"},
        {"role": "assistant", "content": None, "tool_calls": [call("add", "call_3")]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "No."},
    ]


def test_sampling_and_extension_fields_are_passed_on():
    body = translated(
        input="x",
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        parallel_tool_calls=False,
        seed=3,
        routing=True,
        router_policy={"k": 2},
        min_p=0.1,
        unheard_of=1,
        top_k=None,
    )
    del body["messages"]
    assert body == {
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "parallel_tool_calls": False,
        "seed": 3,
        "routing": True,
        "router_policy": {"k": 2},
        "min_p": 0.1,
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 4}, {"logprobs": True, "top_logprobs": 4}),
        ({"top_logprobs": 4}, {"logprobs": True, "top_logprobs": 4}),
        ({"include": ["reasoning.encrypted_content"], "top_logprobs": 0}, {}),
    ],
)
def test_log_probabilities_are_requested(fields, expected):
    body = translated(input="x", **fields)
    del body["messages"]
    assert body == expected


def test_text_formats_are_translated():
    assert "response_format" not in translated(input="x", text={"format": {"type": "text"}, "verbosity": "medium"})
    assert translated(input="x", text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True, "description": "d"}
    assert translated(input="x", text={"format": form})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True, "description": "d"},
    }


def test_tools_and_tool_choice_are_translated():
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
    body = translated(input="x", tools=[TOOL], tool_choice={"type": "function", "name": "add"})
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert translated(input="x", tools=[TOOL], tool_choice="required")["tool_choice"] == "required"
    assert "tool_choice" not in translated(input="x", tools=[], tool_choice="auto")
    assert translated(input="x", tools=[TOOL | {"parameters": None}])["tools"][0]["function"].keys() == {
        "name",
        "description",
        "strict",
    }


def test_allowed_tools_restrict_the_tools():
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "mul"}]}
    body = translated(input="x", tools=[TOOL, TOOL | {"name": "mul"}], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in body["tools"]] == ["mul"]
    assert body["tool_choice"] == "required"
    with pytest.raises(ApiError, match="not one of the functions") as caught:
        translated(input="x", tools=[TOOL], tool_choice=allowed)
    assert caught.value.param == "tool_choice.tools[0]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["message.output_text.logprobs", "everything"]}, "include[1]"),
    ],
)
def test_unsupported_fields_are_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        translated(input="x", **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_defaults_of_unsupported_fields_are_accepted():
    fields = {"background": False, "conversation": None, "reasoning": {"effort": None, "summary": None}, "user": "u"}
    assert translated(input="x", service_tier="flex", max_tool_calls=3, **fields)["user"] == "u"
    translated(input="x", reasoning={"effort": "none"}, stream_options={"include_obfuscation": False})


@pytest.mark.parametrize("body", [{}, {"input": []}, {"input": [{"type": "reasoning", "id": "r"}]}])
def test_an_empty_input_is_refused(body):
    with pytest.raises(ApiError, match="at least one item") as caught:
        translated(**body)
    assert caught.value.param == "input"


def test_item_references_are_resolved():
    request = parse(ResponsesRequest, {"input": [{"id": "msg_1"}, {"type": "item_reference", "id": "msg_2"}]})
    stored = {"msg_1": Message(role="assistant", content="a")}
    with pytest.raises(ApiError, match="'msg_2'") as caught:
        resolved(request.input, stored.get)
    assert caught.value.param == "input[1].id"
    assert resolved(request.input[:1], stored.get) == [stored["msg_1"]]


def test_a_conversation_is_truncated_from_its_beginning():
    request = parse(
        ResponsesRequest,
        {
            "input": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                CALL,
                {"type": "function_call_output", "call_id": "call_1", "output": "2"},
                {"role": "user", "content": "b"},
            ]
        },
    )
    messages = chat_messages(request.input)
    roles = [[message["role"] for message in shortened(messages, cut)] for cut in cuts(messages)]
    assert roles == [["system", "assistant", "tool", "user"], ["system", "user"]]
    assert cuts(messages[-1:]) == []
    assert cuts(messages[:2]) == []
    assert cuts([]) == []


def test_an_item_may_be_referenced_only_once():
    """Otherwise a one-megabyte request could expand to gigabytes."""
    item = {"type": "item_reference", "id": "msg_2"}
    request = parse(ResponsesRequest, {"input": [item, {"role": "user", "content": "a"}, item]})
    with pytest.raises(ApiError, match="'msg_2' is referred to twice") as caught:
        resolved(input_items(request), {"msg_2": Message(role="user", content="long")}.get)
    assert caught.value.param == "input[2].id"
