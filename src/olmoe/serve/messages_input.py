"""From POST /v1/messages to a chat request: blocks become messages, a system prompt the first of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from olmoe.errors import shown
from olmoe.serve.dialects import function_tool, joined, tool_call
from olmoe.serve.errors import ApiError, invalid
from olmoe.serve.messages_models import (
    CountTokensRequest,
    MessageParam,
    MessagesRequest,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)

# The names here of a chat request's fields.
CHAT_NAMES = {
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "messages": "messages",  # without an index, which differs
    "parameters": "input_schema",  # of a tool
    "stop": "stop_sequences",
}


def refuse_what_we_lack(request: CountTokensRequest) -> None:
    """Raise `ApiError` (400) for a field of the protocol that we do not support and whose value matters."""
    if request.thinking is not None and request.thinking.type not in ("disabled", "adaptive"):
        raise _refused("thinking", f'This model does not think; thinking can be "disabled", not {_said(request)}.')
    config = request.output_config
    if config is not None and config.effort not in (None, "high"):
        raise _refused("output_config.effort", f"This model knows no effort {shown(config.effort)}; leave it out.")
    if not isinstance(request, MessagesRequest):
        return
    if request.speed not in (None, "standard"):
        raise _refused("speed", f'speed can only be "standard", not {shown(request.speed)}.')
    if isinstance(request.context_management, dict) and not any(request.context_management.values()):
        request.context_management = None
    for name in ("container", "mcp_servers", "context_management"):
        if value := getattr(request, name):
            raise _refused(name, f"{name} {shown(value)} is not supported; leave it out.")


def _said(request: CountTokensRequest) -> str:
    return shown(request.thinking.type if request.thinking is not None else None)


def _refused(param: str, message: str) -> ApiError:
    return invalid(message, param, "unsupported_parameter")


def chat_body(request: CountTokensRequest) -> dict[str, Any]:
    """The chat request, as a body of /v1/chat/completions.

    A final message of the assistant is the start of the answer: the model continues it.
    """
    messages = chat_messages(request.messages)
    if not messages:
        raise invalid("messages must hold at least one message.", "messages")
    body = request.shared_fields()
    if messages[-1]["role"] == "assistant":
        _check_beginning(messages[-1], len(request.messages) - 1)
        body["continue_final_message"] = True
        body["add_generation_prompt"] = False
    if request.system:
        texts = [request.system] if isinstance(request.system, str) else [block.text for block in request.system]
        messages.insert(0, {"role": "system", "content": joined(texts)})
    body["messages"] = messages
    if request.model is not None:
        body["model"] = request.model
    if isinstance(request, MessagesRequest):
        body["max_completion_tokens"] = request.max_tokens
        for name in ("temperature", "top_p", "top_k"):
            if (value := getattr(request, name)) is not None:
                body[name] = value
        if request.stop_sequences:
            body["stop"] = request.stop_sequences
    output_format = request.output_format or (request.output_config.format if request.output_config else None)
    if output_format is not None:
        schema = {"name": "answer", "schema": output_format.schema_, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    _add_tools(request, body)
    return body


def _check_beginning(message: dict[str, Any], index: int) -> None:
    where = f"messages.{index}"
    if "tool_calls" in message:
        raise invalid(f"{where}: the tool_use at the end needs a tool_result in the next message.", where)
    if not message["content"]:
        raise invalid(f"{where}: the start of an answer must hold text; leave the message out.", where)


def _add_tools(request: CountTokensRequest, body: dict[str, Any]) -> None:
    if request.tools:
        body["tools"] = [function_tool(t.name, t.description, t.input_schema, t.strict) for t in request.tools]
    choice = request.tool_choice
    if choice is None:
        return
    if choice.type == "tool":
        if choice.name is None:
            raise invalid('tool_choice of type "tool" needs a name.', "tool_choice.name")
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif request.tools or choice.type == "any":
        body["tool_choice"] = {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.disable_parallel_tool_use:
        body["parallel_tool_calls"] = False


def chat_messages(messages: Iterable[MessageParam]) -> list[dict[str, Any]]:
    """The messages in the form of a chat: tool results separate, neighbours of one role merged. Raises `ApiError`."""
    chat: list[dict[str, Any]] = []
    turn: list[str] = []  # texts of the user's or the system's turn being collected
    speaker = ""

    def finish() -> None:
        if turn:
            chat.append({"role": speaker, "content": joined(turn.copy())})
            turn.clear()

    for i, message in enumerate(messages):
        if message.role != speaker:
            finish()
            speaker = message.role
        if message.role == "assistant":
            _add_assistant(chat, message, i)
            continue
        for j, block in enumerate(message.blocks):
            if isinstance(block, TextBlock):
                turn.append(block.text)
            elif isinstance(block, ToolResultBlock) and message.role == "user":
                finish()
                chat.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
            else:
                raise _misplaced(block.type, message.role, i, j)
    finish()
    return chat


def _add_assistant(chat: list[dict[str, Any]], message: MessageParam, index: int) -> None:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for j, block in enumerate(message.blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            calls.append(tool_call(block.id, block.name, json.dumps(block.input, ensure_ascii=False)))
        elif isinstance(block, ToolResultBlock):
            raise _misplaced(block.type, message.role, index, j)
    text = "".join(texts)
    if chat and chat[-1]["role"] == "assistant":
        last = chat[-1]
        last["content"] = (last["content"] or "") + text or None
        calls = last.get("tool_calls", []) + calls
    else:
        last = {"role": "assistant", "content": None if calls and not text else text}
        chat.append(last)
    if calls:
        last["tool_calls"] = calls


def _result(block: ToolResultBlock) -> str | list[dict[str, str]]:
    """What a tool returned. A chat has no field for a failure: its text says so."""
    texts = [block.content] if isinstance(block.content, str) else [part.text for part in block.content or ()]
    if block.is_error:
        texts = ["Error: " + "".join(texts)]
    return joined(texts or [""])


def _misplaced(kind: str, role: str, i: int, j: int) -> ApiError:
    where = f"messages.{i}.content.{j}"
    return invalid(f"{where}: a message of the {role} cannot hold a block of type {kind}.", where)
