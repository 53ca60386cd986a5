"""POST /v1/chat/completions: the assistant's answer, whole or as it comes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from olmoe.engine.request import Routing, TokenLogprob
from olmoe.serve import wire
from olmoe.serve.chat_run import (
    Finished,
    Prepared,
    TextDelta,
    ToolCallDelta,
    Usage,
    chat_events,
    prepare_chat,
    usage,
)
from olmoe.serve.protocol import ChatRequest
from olmoe.serve.state import CallContext, ServerState


async def create(
    state: ServerState, body: ChatRequest, context: CallContext
) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
    """The answer, or its chunks if the body wants a stream. Raises `ApiError` before anything runs."""
    prepared = await prepare_chat(state, body, context)
    return _stream(state, prepared) if body.stream else await _whole(state, prepared)


def _finish_reason(chat: ChatRequest, end: Finished) -> str:
    """OpenAI's word for the end, which is "stop" even if the request named the function to call."""
    named = isinstance(chat.tool_choice, dict) and chat.tool_choice.get("type") == "function"
    return "stop" if named and end.reason == "tool_calls" else end.reason


def _head(state: ServerState, chat: ChatRequest, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": chat.model or state.model_name,
    }


def _of_prompt(state: ServerState, prepared: Prepared) -> dict[str, Any]:
    """What is reported about the prompt, if requested."""
    chat, request, found = prepared.chat, prepared.requests[0], dict[str, Any]()
    if chat.prompt_logprobs is not None:
        found["prompt_logprobs"] = wire.prompt_logprobs(state.tokenizer, request.prompt_logprobs)
    if chat.prompt_routing:
        found["prompt_routing"] = wire.routing(request.prompt_routing, state.config.num_experts)
    if chat.return_token_ids:
        found["prompt_token_ids"] = request.prompt_ids
    return found


# ---- the whole answer ----


@dataclass
class _Answer:
    """One choice as it grows."""

    text: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    end: Finished | None = None

    def add(self, event: TextDelta | ToolCallDelta | Finished) -> None:
        if isinstance(event, TextDelta):
            self.text.append(event.text)
            self.logprobs += event.logprobs
            self.token_ids += event.token_ids
            self.routing += event.routing
        elif isinstance(event, ToolCallDelta):
            while len(self.calls) <= event.call:
                self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
            call = self.calls[event.call]
            call["id"] = event.id or call["id"]
            call["function"]["name"] = event.name or call["function"]["name"]
            call["function"]["arguments"] += event.arguments
        else:
            self.end = event


async def _whole(state: ServerState, prepared: Prepared) -> dict[str, Any]:
    chat, total = prepared.chat, Usage(0, 0, 0)
    answers = [_Answer() for _ in prepared.requests]
    async with aclosing(chat_events(state, prepared)) as events:
        async for event in events:
            if isinstance(event, Usage):
                total = event
            else:
                if isinstance(event, Finished):
                    state.check_end(event.reason, event.error)
                answers[event.index].add(event)
    choices = []
    for index, answer in enumerate(answers):
        text = "".join(answer.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.calls:
            message |= {"content": text or None, "tool_calls": answer.calls}
        assert answer.end is not None
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": wire.chat_logprobs(state.tokenizer, answer.logprobs) if chat.logprobs else None,
            "finish_reason": _finish_reason(chat, answer.end),
            "stop_reason": answer.end.stop_string,
        }
        if chat.return_token_ids:
            choice["token_ids"] = answer.token_ids
        if chat.routing:
            choice["routing"] = wire.routing(answer.routing, state.config.num_experts)
        choices.append(choice)
    return {
        **_head(state, chat, "chat.completion"),
        "choices": choices,
        "usage": wire.usage_dict(total),
        **_of_prompt(state, prepared),
    }


# ---- a stream ----


async def _stream(state: ServerState, prepared: Prepared) -> AsyncGenerator[dict[str, Any], None]:
    chat = prepared.chat
    head = _head(state, chat, "chat.completion.chunk")
    silent = not (chat.logprobs or chat.return_token_ids or chat.routing)
    begun = [False] * len(prepared.requests)
    tokens = 0  # sent so far: the engine may be ahead

    def so_far() -> dict[str, Any]:
        if not chat.wants_usage:
            return {}
        now = usage(prepared.requests, generated=tokens) if chat.wants_running_usage else None
        return {"usage": now and wire.usage_dict(now)}

    async with aclosing(chat_events(state, prepared)) as events:
        async for event in events:
            if isinstance(event, Usage):
                if chat.wants_usage:
                    yield {**head, "choices": [], "usage": wire.usage_dict(event)}
                continue
            if not begun[event.index]:
                of_prompt = {} if any(begun) else _of_prompt(state, prepared)
                begun[event.index] = True
                first = {"index": event.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield {**head, "choices": [first], **of_prompt, **so_far()}
            if isinstance(event, TextDelta):
                tokens += len(event.token_ids)
                if silent and not event.text:
                    continue  # bytes of an unfinished character
            yield {**head, "choices": [_chunk(state, chat, event)], **so_far()}


def _chunk(state: ServerState, chat: ChatRequest, event: TextDelta | ToolCallDelta | Finished) -> dict[str, Any]:
    """The choice of a chunk."""
    if isinstance(event, TextDelta):
        choice: dict[str, Any] = {
            "index": event.index,
            "delta": {"content": event.text},
            "logprobs": None,
            "finish_reason": None,
        }
        if chat.logprobs:
            choice["logprobs"] = wire.chat_logprobs(state.tokenizer, event.logprobs)
        if chat.return_token_ids:
            choice["token_ids"] = event.token_ids
        if chat.routing:
            choice["routing"] = wire.routing(event.routing, state.config.num_experts)
        return choice
    if isinstance(event, ToolCallDelta):
        function: dict[str, Any] = {"arguments": event.arguments}
        call: dict[str, Any] = {"index": event.call, "function": function}
        if event.id is not None:
            function |= {"name": event.name}
            call |= {"id": event.id, "type": "function"}
        return {"index": event.index, "delta": {"tool_calls": [call]}, "logprobs": None, "finish_reason": None}
    state.check_end(event.reason, event.error)
    return {
        "index": event.index,
        "delta": {},
        "logprobs": None,
        "finish_reason": _finish_reason(chat, event),
        "stop_reason": event.stop_string,
    }
