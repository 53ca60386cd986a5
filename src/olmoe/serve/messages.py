"""POST /v1/messages, Anthropic's protocol: an answer, whole or as it comes, and how many tokens a request has."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from olmoe.serve import wire
from olmoe.serve.chat_run import Finished, Prepared, chat_events, chat_prompt, prepare_chat
from olmoe.serve.dialects import DialectEndpoint, chat_request, renaming
from olmoe.serve.messages_input import CHAT_NAMES, chat_body, refuse_what_we_lack
from olmoe.serve.messages_models import CountTokensRequest, MessagesRequest
from olmoe.serve.messages_output import MessageWriter, message_object
from olmoe.serve.protocol import ChatRequest, check_fields
from olmoe.serve.sse import ANTHROPIC
from olmoe.serve.state import CallContext, ServerState

Event = dict[str, Any]


async def create(
    state: ServerState, body: MessagesRequest, context: CallContext
) -> dict[str, Any] | AsyncGenerator[Event, None]:
    """The message, or its events if the body wants a stream. Raises `ApiError` before anything runs."""
    chat = await _chat(state, body)
    with renaming(CHAT_NAMES):
        prepared = await prepare_chat(state, chat, context)
    message = message_object(body.model or state.model_name, len(prepared.requests[0].prompt_ids))
    writer = MessageWriter(
        message,
        max_tokens=body.max_tokens,
        encode=lambda routing: wire.routing(routing, state.config.num_experts),
        routing=bool(body.routing),
    )
    events = _events(state, prepared, writer)
    if body.stream:
        return events
    async with aclosing(events):
        async for _ in events:
            pass
    return message


async def count_tokens(state: ServerState, body: CountTokensRequest, context: CallContext) -> dict[str, Any]:
    """How many tokens the prompt of a message would have."""
    state.check_model(body.model)
    chat = await _chat(state, body)
    with renaming(CHAT_NAMES):
        ids, _ = await chat_prompt(state, chat)
    return {"input_tokens": len(ids)}


async def _chat(state: ServerState, body: CountTokensRequest) -> ChatRequest:
    check_fields(body)
    refuse_what_we_lack(body)
    return chat_request(await state.off_loop(chat_body, body), CHAT_NAMES)  # there may be thousands of messages


async def _events(state: ServerState, prepared: Prepared, writer: MessageWriter) -> AsyncGenerator[Event, None]:
    """All events of a message. Raises `ApiError` if it fails."""
    for event in writer.start():
        yield event
    async with aclosing(chat_events(state, prepared)) as news:
        async for each in news:
            if isinstance(each, Finished):
                state.check_end(each.reason, each.error)
            for event in writer.write(each):
                yield event
    for event in writer.end():
        yield event


ENDPOINTS = (
    DialectEndpoint(
        "/v1/messages", MessagesRequest, create, "Answer a conversation (Anthropic's messages).", ANTHROPIC
    ),
    DialectEndpoint(
        "/v1/messages/count_tokens",
        CountTokensRequest,
        count_tokens,
        "How many tokens the prompt of a message has.",
        ANTHROPIC,
        generates=False,
    ),
)
