"""Invalid bodies are answered with one sentence that names the field as the client wrote it."""

from __future__ import annotations

import pytest

from olmoe.serve.dialects import parse, renamed
from olmoe.serve.errors import ApiError
from olmoe.serve.messages_models import MessagesRequest
from olmoe.serve.responses_models import ResponsesRequest


@pytest.mark.parametrize(
    ("body", "param", "part_of_message"),
    [
        ({"input": [{"role": "user"}]}, "input[0].content", "this field is required."),
        (
            {"input": [{"role": "king", "content": "x"}]},
            "input[0].role",
            "'user', 'assistant', 'system' or 'developer'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "A part of type 'input_image' is not supported; the model reads only text",
        ),
        ({"input": [{"type": "computer_call"}]}, "input[0]", "An item of type 'computer_call' is not supported"),
        ({"input": 3}, "input", "list"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]", "A tool of type 'web_search' is not supported"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice", "A tool choice of type 'mcp'"),
        ({"input": "x", "tool_choice": "never"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format", "A format of type 'xml'"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "required"),
        ({"input": "x", "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"input": "x", "metadata": {"k" * 65: "v"}}, "metadata", "at most 16 entries"),
        ({"input": "x", "truncation": "sometimes"}, "truncation", "'auto' or 'disabled'"),
    ],
)
def test_the_invalid_field_is_named(body, param, part_of_message):
    with pytest.raises(ApiError) as caught:
        parse(ResponsesRequest, body)
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert part_of_message in error.message
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("body", "param", "part_of_message"),
    [
        ({"messages": []}, "max_tokens", "required"),
        ({"max_tokens": 0, "messages": []}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5}, "messages", "required"),
        (
            {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0",
            "A content block of type 'image' is not supported",
        ),
        (
            {
                "max_tokens": 5,
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}],
                    }
                ],
            },
            "messages.0.content.0.content.0",
            "A tool result's block of type 'image'",
        ),
        ({"max_tokens": 5, "messages": [], "tools": [{"type": "bash_20250124"}]}, "tools.0", "'bash_20250124'"),
        ({"max_tokens": 5, "messages": [], "tools": [{"name": "f"}]}, "tools.0.input_schema", "required"),
        ({"max_tokens": 5, "messages": [], "tool_choice": {"type": "some"}}, "tool_choice.type", "'auto', 'any'"),
    ],
)
def test_anthropic_errors_name_fields_with_dots(body, param, part_of_message):
    with pytest.raises(ApiError) as caught:
        parse(MessagesRequest, body, dotted=True)
    assert caught.value.param == param
    assert part_of_message in caught.value.message


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_a_body_must_be_an_object(body):
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse(ResponsesRequest, body)


def test_chat_fields_are_named_as_the_client_knows_them():
    names = {"messages": "input", "max_completion_tokens": "max_output_tokens"}
    error = ApiError(
        400, "max_completion_tokens must be at least 1, not 0.", "x", "max_completion_tokens", "c", {"a": "b"}
    )
    mine = renamed(error, names)
    assert (mine.param, mine.message) == ("max_output_tokens", "max_output_tokens must be at least 1, not 0.")
    assert (mine.status, mine.type, mine.code, mine.headers) == (400, "x", "c", {"a": "b"})
    assert renamed(ApiError(400, "messages[2].content: no.", "x", "messages[2].content"), names).message == "input: no."
    other = renamed(ApiError(400, "no", "x", "temperature"), names)
    assert (other.param, other.message) == ("temperature", "no")
    nested = renamed(ApiError(400, "tools[1].function.name is bad.", "x", "tools[1].function.name"), names)
    assert (nested.param, nested.message) == ("tools[1].name", "tools[1].name is bad.")
    where = "tools[1].function.parameters"
    assert renamed(ApiError(400, f"{where} is bad.", "x", where), {"parameters": "input_schema"}).message == (
        "tools[1].input_schema is bad."
    )
    assert renamed(ApiError(500, "no", "x"), names).param is None
