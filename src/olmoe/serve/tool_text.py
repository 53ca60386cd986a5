"""Tool calls as the model writes them: how the prompt asks for them, their grammar, and how they are read back.

A call is `<tool_call>`, a line `{"name": ..., "arguments": ...}`, `</tool_call>`: the form of Hermes, Qwen and many
others. What a tool returned is put between `<tool_response>` tags.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from olmoe.engine.json_schemas import prepared
from olmoe.serve.chat_run import Finished, TextDelta, ToolCallDelta

BEGIN, END = "<tool_call>", "</tool_call>"
MOST_CALLS = 16  # in one answer

INSTRUCTIONS = """\
You can call functions. Here are their JSON schemas, one per line:
<tools>
{tools}
</tools>
To call one, write its name and its arguments, as required by its schema, and nothing after them:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `given` is its entry in the request, `where` the path of that entry."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    given: Mapping[str, Any]
    where: str


def instructions(tools: Sequence[Tool]) -> str:
    """What the system prompt says about tools if the chat template says nothing."""
    lines = (json.dumps({"type": "function", "function": tool.given}, ensure_ascii=False) for tool in tools)
    return INSTRUCTIONS.format(tools="\n".join(lines))


def written_call(name: str, arguments: str) -> str:
    """A call as the model writes it; `arguments` is JSON."""
    return f'{BEGIN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n{END}'


def written_response(content: str) -> str:
    """What a tool returned, as the model reads it."""
    return f"<tool_response>\n{content}\n</tool_response>"


@dataclass(frozen=True)
class Calls:
    """What an answer may call: any tools or none, at least one, or one `named` function."""

    tools: tuple[Tool, ...]
    mode: Literal["auto", "required", "named"]
    parallel: bool = True

    def lark(self, content: str | None = None) -> str:
        """The grammar of such answers. `content` is the Lark rule of answers without calls, any text if None.

        Raises `UserError` for a tool with an invalid schema.
        """
        more = MOST_CALLS - 1 if self.parallel and self.mode != "named" else 0
        rules = [
            "%llguidance {}",
            f'calls: body ("\\n{BEGIN}" body){{0,{more}}}' if more else "calls: body",
            f'body: ({" | ".join(f"call_{i}" for i in range(len(self.tools)))}) "}}\\n{END}"',
            *(self._call(i, tool) for i, tool in enumerate(self.tools)),
        ]
        if self.mode != "auto":
            start = [f'start: "{BEGIN}" calls']
        elif content is not None:
            start = [f'start: content | "{BEGIN}" calls', f"content: {content}"]
        else:  # as soon as the mark is complete, the text before it has ended
            start = ["start: TEXT | head calls", f'head[lazy]: TEXT "{BEGIN}"', r"TEXT: /(.|\n)*/"]
        return "\n".join([rules[0], *start, *rules[1:], ""])

    @staticmethod
    def _call(index: int, tool: Tool) -> str:
        schema = prepared(tool.parameters, strict=tool.strict, name=f"{tool.where}.parameters")
        head = f'\n{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        return f"call_{index}: {json.dumps(head)} %json {schema}"


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class CallReader:
    """Reads one answer as it comes: text, and calls, whose name and arguments are reported as soon as they are certain.

    Marks never show. White space around calls is dropped. A call that is cut off is reported as far as it goes.
    `forced` answers start with a call; others that end within the mark of their first call count as text.
    """

    def __init__(self, index: int, *, forced: bool = False) -> None:
        self._index, self._forced = index, forced
        self._pending = ""  # read but not yet reported
        self._inside: Literal["text", "head", "arguments", "tail"] = "text"
        self._depth, self._quoted, self._escaped = 0, False, False
        self._calls, self._complete = 0, 0

    def read(self, delta: TextDelta) -> Sequence[TextDelta | ToolCallDelta]:
        """The events that the new text makes certain. Data about tokens comes with the text, even if that is empty."""
        self._pending += delta.text
        text: list[str] = []
        calls: list[ToolCallDelta] = []
        while self._step(text, calls):
            pass
        content = "".join(text)
        events: list[TextDelta | ToolCallDelta] = []
        if content or delta.token_ids or delta.logprobs or delta.routing:
            events.append(TextDelta(self._index, content, delta.logprobs, delta.token_ids, delta.routing))
        return [*events, *_joined(calls)]

    def finish(self, end: Finished) -> Sequence[TextDelta | ToolCallDelta | Finished]:
        """Text that was held back, and the end: "tool_calls" if there were any, all complete."""
        events: list[TextDelta | ToolCallDelta | Finished] = []
        begun = (self._calls or self._forced) and BEGIN.startswith(self._pending.strip())
        if self._inside == "text" and self._pending and not begun:
            events.append(TextDelta(self._index, self._pending))
        self._pending = ""
        called = self._calls and self._complete == self._calls and self._inside == "text"
        if end.reason == "stop" and called:
            end = Finished(self._index, "tool_calls", end.error, end.stop_string)
        return [*events, end]

    def _step(self, text: list[str], calls: list[ToolCallDelta]) -> bool:
        """Report what is certain in the pending text -> whether there may be more."""
        if self._inside == "text":
            return self._read_text(text)
        if self._inside == "head":
            return self._read_head(calls)
        if self._inside == "arguments":
            return self._read_arguments(calls)
        at = self._pending.find(END)
        if at < 0:
            return False
        self._pending, self._inside = self._pending[at + len(END) :], "text"
        self._complete += 1
        return True

    def _read_text(self, text: list[str]) -> bool:
        at = self._pending.find(BEGIN)
        if at >= 0:
            text.append(self._pending[:at].rstrip())
            self._pending, self._inside = self._pending[at + len(BEGIN) :], "head"
            return True
        held = next(n for n in range(len(BEGIN), -1, -1) if self._pending.endswith(BEGIN[:n]))
        sure = self._pending[: len(self._pending) - held].rstrip()
        text.append(sure)
        self._pending = self._pending[len(sure) :]
        return False

    def _read_head(self, calls: list[ToolCallDelta]) -> bool:
        found = _HEAD.match(self._pending)
        if found is None:
            return False
        calls.append(ToolCallDelta(self._index, self._calls, f"call_{uuid.uuid4().hex[:24]}", json.loads(found[1]), ""))
        self._calls += 1
        self._pending, self._inside = self._pending[found.end() :], "arguments"
        self._depth, self._quoted, self._escaped = 0, False, False
        return True

    def _read_arguments(self, calls: list[ToolCallDelta]) -> bool:
        count = 0
        for count, character in enumerate(self._pending, 1):  # noqa: B007
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self._inside = "tail"
                    break
        if count:
            calls.append(ToolCallDelta(self._index, self._calls - 1, None, None, self._pending[:count]))
        self._pending = self._pending[count:]
        return self._inside == "tail"


def _joined(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """The parts of a call's arguments in one text, joined into one delta that follows the one with its name."""
    result: list[ToolCallDelta] = []
    for delta in deltas:
        if result and delta.id is None and result[-1].id is None and result[-1].call == delta.call:
            last = result.pop()
            delta = ToolCallDelta(last.index, last.call, None, None, last.arguments + delta.arguments)
        result.append(delta)
    return result
