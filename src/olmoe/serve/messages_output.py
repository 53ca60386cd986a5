"""From chat events to a message in Anthropic's protocol, and to the events of its stream.

A message is a list of blocks, texts and uses of tools, numbered from 0. Each is opened, grows by deltas, and is closed
before the next one opens. The stop reason and the usage come last.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from olmoe.engine.request import Routing
from olmoe.serve.chat_run import ChatEvent, Finished, TextDelta, ToolCallDelta, Usage

Event = dict[str, Any]


def message_object(model: str, prompt_tokens: int = 0) -> dict[str, Any]:
    """A message that has just started. How much of its prompt was cached is known only later."""
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage_object(Usage(prompt_tokens, 0, 0)),
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """The usage: tokens found in the prefix cache do not count as `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


class MessageWriter:
    """Builds `message` from chat events, and yields the stream's events for each. Errors are left to the caller.

    `encode` turns the routing of several tokens into JSON; `max_tokens` distinguishes the client's limit from the end
    of the context.
    """

    def __init__(
        self,
        message: dict[str, Any],
        *,
        max_tokens: int,
        encode: Callable[[list[Routing]], dict[str, Any] | None],
        routing: bool = False,
    ) -> None:
        self.message = message
        self._max_tokens = max_tokens
        self._encode = encode
        self._routing: list[Routing] | None = [] if routing else None
        self._routes: list[Routing] = []  # of tokens that no delta has reported yet
        self._block: dict[str, Any] | None = None  # the open one
        self._call = -1  # number of the open call
        self._texts: list[str] = []  # of the open block, joined when it closes
        self._finished: Finished | None = None
        self._usage: Usage | None = None

    def start(self) -> Iterator[Event]:
        """The events before the first token."""
        yield {"type": "message_start", "message": self.message | {"content": []}}
        yield {"type": "ping"}

    def write(self, news: ChatEvent) -> Iterator[Event]:
        """The events that report `news`."""
        match news:
            case TextDelta():
                yield from self._text(news)
            case ToolCallDelta():
                yield from self._tool_call(news)
            case Finished():
                self._finished = news
                if not self.message["content"]:
                    yield from self._open({"type": "text", "text": ""})  # an empty answer is an answer
                yield from self._close()
            case Usage():
                self._usage = news

    def end(self) -> Iterator[Event]:
        """The last events: how the message ended."""
        news = self._finished
        assert news is not None
        message = self.message
        message["stop_reason"] = self._stop_reason(news)
        message["stop_sequence"] = news.stop_string if message["stop_reason"] == "stop_sequence" else None
        if self._usage is not None:
            message["usage"] = usage_object(self._usage)
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
        last: dict[str, Any] = {"type": "message_delta", "delta": delta, "usage": message["usage"]}
        if self._routing is not None:
            last["routing"] = message["routing"] = self._encode(self._routing)
        yield last
        yield {"type": "message_stop"}

    def _stop_reason(self, news: Finished) -> str:
        if news.reason == "length":
            tokens = self._usage.completion_tokens if self._usage is not None else self._max_tokens
            return "max_tokens" if tokens >= self._max_tokens else "model_context_window_exceeded"
        if news.reason == "tool_calls" or self.message["content"][-1]["type"] == "tool_use":
            return "tool_use"  # even if the chat says "stop", as it does if one function was required
        return "stop_sequence" if isinstance(news.stop_string, str) else "end_turn"  # a token id is not a stop sequence

    # ---- blocks ----

    def _text(self, news: TextDelta) -> Iterator[Event]:
        if self._routing is not None:
            self._routing += news.routing
            self._routes += news.routing
        if self._block is None or self._block["type"] != "text":
            if not news.text:
                return  # perhaps bytes of an unfinished character
            yield from self._close()
            yield from self._open({"type": "text", "text": ""})
        more = {"routing": self._encode(self._routes)} if self._routes else {}
        if news.text or more:
            self._texts.append(news.text)
            self._routes = []
            yield self._delta({"type": "text_delta", "text": news.text}, **more)

    def _tool_call(self, news: ToolCallDelta) -> Iterator[Event]:
        if self._block is None or self._block["type"] != "tool_use" or news.call != self._call:
            yield from self._close()
            name = (news.id or uuid.uuid4().hex).removeprefix("call_")
            yield from self._open({"type": "tool_use", "id": f"toolu_{name}", "name": news.name or "", "input": {}})
            self._call = news.call
        if news.arguments:
            self._texts.append(news.arguments)
            yield self._delta({"type": "input_json_delta", "partial_json": news.arguments})

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        self._block = block
        self._texts = []
        self.message["content"].append(block)
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any], **more: Any) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta, **more}

    def _close(self) -> Iterator[Event]:
        block, self._block = self._block, None
        if block is None:
            return
        text = "".join(self._texts)
        if block["type"] == "text":
            block["text"] = text
        else:
            block["input"] = _arguments(text)
        yield {"type": "content_block_stop", "index": self._index}

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; none if they are incomplete, for example cut by `max_tokens`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
