"""Tools of a chat: what a request says about them, how the model is told about them, and what its answer may be.

If the checkpoint's chat template writes tools, and calls in the form of `tool_text`, tools go through the template.
For others, OLMoE's own among them, a paragraph of the system prompt describes them, and calls and results in the
history become text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE
from olmoe.errors import shown
from olmoe.serve.chat_run import template_messages
from olmoe.serve.errors import invalid, unsupported
from olmoe.serve.protocol import ChatRequest
from olmoe.serve.tool_text import BEGIN, CallReader, Calls, Tool, instructions, written_call, written_response
from olmoe.tokenizer import Tokenizer

MOST_TOOLS = 128
_NAME = re.compile(r"[\w./:-]{1,128}")
_RESULTS = ("tool", "function")  # roles: OpenAI's, and its predecessor


@dataclass
class Plan:
    """What to do about a chat's tools: the prompt's messages and tools, and which calls the answer may make."""

    messages: list[dict[str, Any]]
    template_tools: list[dict[str, Any]] | None
    constraint: Calls | None

    def reader(self, index: int) -> CallReader | None:
        """A reader for a choice; None if its text is plain."""
        calls = self.constraint
        return None if calls is None else CallReader(index, forced=calls.mode != "auto")


def plan(chat: ChatRequest, tokenizer: Tokenizer) -> Plan:
    """What to do about the tools of a chat, or those in its history. Raises `ApiError` (400) for invalid tools."""
    tools = read_tools(chat.tools)
    calls = read_choice(chat, tools)
    template = tokenizer.named_templates.get("tool_use") if calls else None
    template = template or tokenizer.chat_template or OLMOE_CHAT_TEMPLATE
    own = tokenizer.chat_template not in (None, OLMOE_CHAT_TEMPLATE)
    messages = template_messages(chat, own)
    _check_calls(messages)
    if writes_tools(template):
        shown_tools = [{"type": "function", "function": dict(tool.given)} for tool in calls.tools] if calls else None
        return Plan([_with_objects(message) for message in messages], shown_tools, calls)
    messages = as_text(messages)
    return Plan(_told(messages, calls.tools) if calls else messages, None, calls)


def writes_tools(template: str) -> bool:
    """Whether a chat template tells the model about tools, in the form that is read here."""
    return re.search(r"\btools\b", template) is not None and BEGIN in template


# ---- what a request says ----


def read_tools(given: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """The tools of a request. Raises `ApiError` (400) with the path of an invalid one."""
    if given and len(given) > MOST_TOOLS:
        raise invalid(f"tools has {len(given)} entries; at most {MOST_TOOLS} are supported.", "tools")
    tools: dict[str, Tool] = {}
    for index, entry in enumerate(given or ()):
        tool = _read_tool(entry, f"tools[{index}]")
        if tool.name in tools:
            raise invalid(f"tools has two functions named {shown(tool.name)}.", f"tools[{index}].function.name")
        tools[tool.name] = tool
    return list(tools.values())


def _read_tool(entry: Mapping[str, Any], where: str) -> Tool:
    if entry.get("type", "function") != "function":
        raise unsupported(f"{where}.type", f"{shown(entry['type'])}; only functions are supported")
    function = entry.get("function")
    if not isinstance(function, Mapping):
        raise invalid(f"{where}.function is missing; give an object with name and parameters.", f"{where}.function")
    where += ".function"
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(
            f"{where}.name must be up to 128 letters, digits and _ . / : -, not {shown(name)}.", f"{where}.name"
        )
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{where}.strict must be true or false, not {shown(strict)}.", f"{where}.strict")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise invalid(f"{where}.description must be a text.", f"{where}.description")
    given = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return Tool(name, _read_parameters(function.get("parameters"), where), bool(strict), given, where)


def _read_parameters(given: object, where: str) -> Mapping[str, Any]:
    """The schema of the arguments, which must describe an object; a missing schema means no arguments."""
    if given is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(given, Mapping) or given.get("type", "object") != "object":
        raise invalid(f"{where}.parameters must be the JSON schema of an object.", f"{where}.parameters")
    return {"type": "object", **given}


def read_choice(chat: ChatRequest, tools: Sequence[Tool]) -> Calls | None:
    """Which calls the answer may make; None for no calls. Raises `ApiError` (400) for an invalid choice."""
    choice, parallel = chat.tool_choice, chat.parallel_tool_calls is not False
    if choice in (None, "auto", "none"):
        return Calls(tuple(tools), "auto", parallel) if tools and choice != "none" else None
    if not tools:
        raise invalid("tool_choice asks for a call, but there are no tools.", "tool_choice")
    if choice in ("required", "any"):
        return Calls(tuple(tools), "required", parallel)
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        return Calls((_named(name, tools, "tool_choice.function.name"),), "named", False)
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools", choice), tools, parallel)
    raise invalid(
        f'tool_choice must be "none", "auto", "required", or an object that names a function, not {shown(choice)}.',
        "tool_choice",
    )


def _named(name: object, tools: Sequence[Tool], where: str) -> Tool:
    for tool in tools:
        if tool.name == name:
            return tool
    raise invalid(f"tool_choice names the function {shown(name)}, which is not among the tools.", where)


def _allowed(given: object, tools: Sequence[Tool], parallel: bool) -> Calls:
    """OpenAI's `allowed_tools`: a choice of some of the tools."""
    where = "tool_choice.allowed_tools"
    entries = given.get("tools") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or given.get("mode") not in ("auto", "required") or not isinstance(entries, list):
        raise invalid(f'{where} must have a mode, "auto" or "required", and a list of tools.', where)
    names = []
    for entry in entries:
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        names.append(function.get("name") if isinstance(function, Mapping) else entry)
    if not names:
        raise invalid(f"{where}.tools is empty.", f"{where}.tools")
    chosen = {tool.name: tool for tool in (_named(name, tools, f"{where}.tools") for name in names)}
    return Calls(tuple(chosen.values()), "auto" if given["mode"] == "auto" else "required", parallel)


# ---- messages ----


def _check_calls(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ApiError` (400) for invalid calls in the history."""
    for index, message in enumerate(messages):
        where = f"messages[{index}].tool_calls"
        calls = message.get("tool_calls")
        if calls is None:
            continue
        if not isinstance(calls, list):
            raise invalid(f"{where} must be a list.", where)
        for number, call in enumerate(calls):
            function = call.get("function") if isinstance(call, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(name, str):
                raise invalid(f"{where}[{number}] must have a function with a name.", f"{where}[{number}].function")
            if not isinstance(function.get("arguments", ""), str | Mapping):
                raise invalid(
                    f"{where}[{number}].function.arguments must be a text that holds JSON.",
                    f"{where}[{number}].function.arguments",
                )


def _arguments(function: Mapping[str, Any]) -> Any:
    """The arguments of a call: an object, or the text itself if it is not JSON."""
    given = function.get("arguments") or "{}"
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as objects, which chat templates themselves write as JSON."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    read = [{**call, "function": {**call["function"], "arguments": _arguments(call["function"])}} for call in calls]
    return {**message, "tool_calls": read}


def as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template without tools: calls become text of the assistant, results become text of the user."""
    result: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        role = message["role"]
        if role in _RESULTS:
            text = written_response(message["content"])
            if after_result:
                result[-1]["content"] += "\n" + text
            else:
                result.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            calls = (call["function"] for call in message["tool_calls"])
            written = [written_call(call["name"], json.dumps(_arguments(call), ensure_ascii=False)) for call in calls]
            content = "\n".join(text for text in (message["content"], *written) if text)
            result.append({**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content})
        else:
            result.append(dict(message))
        after_result = role in _RESULTS
    return result


def _told(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages, with the tools in the system prompt."""
    text = instructions(tools)
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}" if messages[0]["content"] else text}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
