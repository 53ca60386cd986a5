"""POST /v1/messages as a chat request."""

from __future__ import annotations

import pytest

from olmoe.serve.dialects import parse
from olmoe.serve.errors import ApiError
from olmoe.serve.messages_input import chat_body, refuse_what_we_lack
from olmoe.serve.messages_models import CountTokensRequest, MessagesRequest

HELLO = [{"role": "user", "content": "Hello"}]
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}
TOOL = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object"},
    "cache_control": {"type": "ephemeral"},
}


def translated(messages=HELLO, **body):
    request = parse(MessagesRequest, {"max_tokens": 5, "messages": messages, **body}, dotted=True)
    refuse_what_we_lack(request)
    return chat_body(request)


def test_a_minimal_request_is_accepted():
    assert translated(model="m") == {"model": "m", "messages": HELLO, "max_completion_tokens": 5}


@pytest.mark.parametrize(
    ("system", "content"),
    [
        ("Be brief.", "Be brief."),
        ([{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], "Be brief."),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        ),
    ],
)
def test_the_system_prompt_is_the_first_message(system, content):
    assert translated(system=system)["messages"] == [{"role": "system", "content": content}, *HELLO]


def test_the_system_prompt_may_be_missing():
    assert translated(system="")["messages"] == translated(system=[])["messages"] == HELLO


def test_blocks_become_messages():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "I add."},
                {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": "é"}},
                {"type": "tool_use", "id": "toolu_2", "name": "add", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "2"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "no"}],
                 "is_error": True},
                {"type": "text", "text": "And now?"},
            ],
        },
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_3", "name": "add", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_3"}]},
    ]  # fmt: skip

    def call(name, arguments):
        return {"id": name, "type": "function", "function": {"name": "add", "arguments": arguments}}

    assert translated(messages)["messages"] == [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [call("toolu_1", '{"a": "é"}'), call("toolu_2", "{}")],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "2"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}, {"type": "text", "text": "Well?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call("toolu_3", "{}")]},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
    ]


def test_consecutive_messages_of_one_role_are_merged():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
        {"role": "system", "content": "e"},
        {"role": "user", "content": "f"},
    ]
    assert translated(messages)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "system", "content": "e"},
        {"role": "user", "content": "f"},
    ]


def test_a_prefilled_answer_is_continued():
    body = translated([*HELLO, {"role": "assistant", "content": "The best answer is ("}])
    assert body["messages"][-1] == {"role": "assistant", "content": "The best answer is ("}
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([*HELLO, {"role": "assistant", "content": ""}], "messages.1"),
        ([*HELLO, {"role": "assistant", "content": [{"type": "thinking"}]}], "messages.1"),
        (
            [*HELLO, {"role": "assistant", "content": [USE]}],
            "messages.1",
        ),
        ([{"role": "user", "content": [USE]}], "messages.0.content.0"),
        ([*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "a"}, RESULT]}], "messages.1.content.1"),
        ([{"role": "system", "content": [RESULT]}], "messages.0.content.0"),
    ],
)  # fmt: skip
def test_invalid_conversations_are_refused(messages, param):
    with pytest.raises(ApiError) as caught:
        translated(messages)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_sampling_and_extension_fields_are_passed_on():
    body = translated(
        temperature=0.0, top_p=0.9, top_k=40, stop_sequences=["\n\n"], routing=True, router_policy={"k": 2}, seed=1,
        metadata={"user_id": "u"}, stream=True, service_tier="auto", speed="standard", unheard_of=2,
    )  # fmt: skip
    del body["messages"]
    assert body == {
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["\n\n"],
        "routing": True,
        "router_policy": {"k": 2},
        "seed": 1,
    }


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_output_schema_is_passed_on(field):
    form = {"type": "json_schema", "schema": {"type": "object"}}
    body = translated(**{field: {"format": form, "effort": "high"} if field == "output_config" else form})
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
    }


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
    ],
)
def test_tools_are_translated(choice, expected):
    body = translated(tools=[TOOL], tool_choice=choice | {"disable_parallel_tool_use": True})
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == expected
    assert body["parallel_tool_calls"] is False
    assert "parallel_tool_calls" not in translated(tools=[TOOL], tool_choice=choice)
    assert "tool_choice" not in translated(tools=[TOOL])


def test_a_tool_choice_without_tools_is_refused():
    assert "tool_choice" not in translated(tool_choice={"type": "auto"})
    assert translated(tool_choice={"type": "any"})["tool_choice"] == "required"  # which the chat refuses
    with pytest.raises(ApiError, match="needs a name") as caught:
        translated(tools=[TOOL], tool_choice={"type": "tool"})
    assert caught.value.param == "tool_choice.name"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"speed": "fast"}, "speed"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear"}]}}, "context_management"),
    ],
)
def test_unsupported_fields_are_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        translated(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_defaults_of_unsupported_fields_are_accepted():
    translated(thinking={"type": "disabled"}, mcp_servers=[], context_management={"edits": []}, container=None)
    translated(thinking={"type": "adaptive"}, output_config={})


def test_counting_tokens_needs_no_limit():
    request = parse(CountTokensRequest, {"messages": HELLO, "tools": [TOOL], "system": "s"}, dotted=True)
    refuse_what_we_lack(request)
    body = chat_body(request)
    assert "max_completion_tokens" not in body
    assert len(body["messages"]) == 2
    assert len(body["tools"]) == 1
