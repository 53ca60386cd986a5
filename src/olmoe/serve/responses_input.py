"""From POST /v1/responses to a chat request: items become messages, flat tools nested, `text.format` a format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from olmoe.errors import shown
from olmoe.serve.dialects import function_tool, joined, tool_call
from olmoe.serve.errors import ApiError, invalid
from olmoe.serve.responses_models import (
    AllowedTools,
    Content,
    CountInputRequest,
    FunctionCall,
    FunctionCallOutput,
    FunctionChoice,
    FunctionTool,
    Item,
    ItemReference,
    JsonFormat,
    Message,
    Reasoning,
    ResponsesRequest,
    SchemaFormat,
    TextPart,
)

# The names here of a chat request's fields.
CHAT_NAMES = {
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}

# What `include` may name. All but the log-probabilities belong to items that never occur in our answers.
_INCLUDABLE = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)


def refuse_what_we_lack(request: CountInputRequest) -> None:
    """Raise `ApiError` (400) for a field of the protocol that we do not support and whose value matters."""
    for name, remedy in (
        ("background", "wait for the answer, or stream it"),
        ("conversation", "use previous_response_id"),
        ("prompt", "send the text itself in input"),
        ("context_management", 'use truncation "auto"'),
        ("moderation", "leave it out"),
    ):
        if value := getattr(request, name, None):
            raise _refused(name, f"{name} {shown(value)} is not supported; {remedy}.")
    if request.reasoning is not None:
        for name in ("effort", "summary"):
            if getattr(request.reasoning, name) not in (None, "none"):
                raise _refused(f"reasoning.{name}", f"This model does not reason; leave reasoning.{name} out.")
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise _refused("text.verbosity", f'text.verbosity can only be "medium", not {shown(request.text.verbosity)}.')
    for i, name in enumerate(request.include or () if isinstance(request, ResponsesRequest) else ()):
        if name not in _INCLUDABLE:
            raise _refused(f"include[{i}]", f"include has no {shown(name)}; it may name {', '.join(_INCLUDABLE)}.")
    _check_finite(request)


def _check_finite(request: CountInputRequest) -> None:
    """Schemas are sent back with the response, and JSON has no infinity, which 1e999 is read as."""
    schemas = {f"tools[{i}].parameters": tool.parameters for i, tool in enumerate(request.tools or ())}
    if request.text is not None and isinstance(request.text.format, SchemaFormat):
        schemas["text.format.schema"] = request.text.format.schema_
    if isinstance(request.tool_choice, AllowedTools):
        schemas["tool_choice.tools"] = {"tools": request.tool_choice.tools}
    for param, schema in schemas.items():
        try:
            json.dumps(schema, allow_nan=False)
        except ValueError:
            raise invalid(f"{param} holds a number that is too large.", param) from None


def _refused(param: str, message: str) -> ApiError:
    return invalid(message, param, "unsupported_parameter")


def input_items(request: CountInputRequest) -> list[Item]:
    """What the request adds to the conversation."""
    if request.input is None:
        return []
    if isinstance(request.input, str):
        return [Message(role="user", content=request.input)]
    return list(request.input)


def resolved(items: Iterable[Item], find: Callable[[str], Item | None]) -> list[Item]:
    """The items, with references replaced by what they refer to. Raises `ApiError` if `find` does not know one."""
    found: list[Item] = []
    seen = set[str]()
    for i, item in enumerate(items):
        if isinstance(item, ItemReference):
            if item.id in seen:  # a short request must not stand for any number of long texts
                raise invalid(f"The item {shown(item.id)} is referred to twice; once is enough.", f"input[{i}].id")
            seen.add(item.id)
            target = find(item.id)
            if target is None:
                raise invalid(f"No stored item has the id {shown(item.id)}; send the item itself.", f"input[{i}].id")
            item = target
        found.append(item)
    return found


def chat_body(request: CountInputRequest, items: Sequence[Item]) -> dict[str, Any]:
    """The chat request, as a body of /v1/chat/completions, for `items`, the whole conversation."""
    messages = chat_messages(items)
    if not messages:
        raise invalid("input must hold a text or at least one item.", "input")
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    body = request.shared_fields()
    body["messages"] = messages
    if isinstance(request, ResponsesRequest):
        if request.max_output_tokens is not None:
            body["max_completion_tokens"] = request.max_output_tokens
        if request.wants_logprobs:
            body["logprobs"] = True
            body["top_logprobs"] = request.top_logprobs or 0
    for name in ("model", "temperature", "top_p", "parallel_tool_calls", "user"):
        if (value := getattr(request, name, None)) is not None:
            body[name] = value
    _add_format(request, body)
    _add_tools(request, body)
    return body


def _add_format(request: CountInputRequest, body: dict[str, Any]) -> None:
    wanted = request.text.format if request.text is not None else None
    if isinstance(wanted, JsonFormat):
        body["response_format"] = {"type": "json_object"}
    elif isinstance(wanted, SchemaFormat):
        schema = {"name": wanted.name, "schema": wanted.schema_, "strict": wanted.strict}
        if wanted.description is not None:
            schema["description"] = wanted.description
        body["response_format"] = {"type": "json_schema", "json_schema": schema}


def _add_tools(request: CountInputRequest, body: dict[str, Any]) -> None:
    tools: Sequence[FunctionTool] = request.tools or ()
    choice: Any = request.tool_choice
    if isinstance(choice, AllowedTools):
        names = [tool.name for tool in tools]
        for i, tool in enumerate(choice.tools):
            if tool.get("type") != "function" or tool.get("name") not in names:
                raise invalid(
                    f"tool_choice allows {shown(tool)}, which is not one of the functions in tools.",
                    f"tool_choice.tools[{i}]",
                )
        allowed = [tool["name"] for tool in choice.tools]
        tools = [tool for tool in tools if tool.name in allowed]
        choice = choice.mode
    elif isinstance(choice, FunctionChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    if tools:
        body["tools"] = [function_tool(t.name, t.description, t.parameters, t.strict) for t in tools]
    if choice is not None and (tools or choice not in ("auto", "none")):
        body["tool_choice"] = choice


def chat_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """The items as chat messages. An assistant's text and the calls it made right after it are one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        last = messages[-1] if messages else None
        match item:
            case Message(role="assistant"):
                messages.append({"role": "assistant", "content": "".join(_texts(item.content))})
            case Message():
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": joined(_texts(item.content))})
            case FunctionCall():
                call = tool_call(item.call_id, item.name, item.arguments)
                if last is not None and last["role"] == "assistant":
                    last.setdefault("tool_calls", []).append(call)
                else:
                    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
            case FunctionCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(_texts(item.output))})
            case Reasoning() | ItemReference():  # nothing for the model to read; references have been resolved
                pass
    return messages


def _texts(content: Content) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, TextPart) else part.refusal for part in content] or [""]


def cuts(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Where a conversation may start without its oldest messages, for `shortened`: what `truncation: "auto"` may try.

    The last message stays; an output goes with the call that it answers.
    """
    starts = [i for i, each in enumerate(messages[1:], start=1) if each["role"] not in ("system", "tool")]
    nothing = bool(starts) and all(each["role"] == "system" for each in messages[: starts[0]])
    return starts[nothing:]


def shortened(messages: Sequence[dict[str, Any]], cut: int) -> list[dict[str, Any]]:
    """The conversation from message `cut` on, after the system messages before it."""
    return [each for each in messages[:cut] if each["role"] == "system"] + list(messages[cut:])
