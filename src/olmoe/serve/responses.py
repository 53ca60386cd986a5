"""POST /v1/responses, OpenAI's newer protocol, and stored responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from olmoe.engine.request import TokenLogprob
from olmoe.errors import shown
from olmoe.serve import wire
from olmoe.serve.chat_run import Finished, Prepared, chat_events, chat_prompt, prepare_chat
from olmoe.serve.dialects import DialectEndpoint, chat_request, renaming
from olmoe.serve.errors import ApiError, invalid
from olmoe.serve.protocol import ChatRequest, check_fields
from olmoe.serve.responses_input import (
    CHAT_NAMES,
    chat_body,
    cuts,
    input_items,
    refuse_what_we_lack,
    resolved,
    shortened,
)
from olmoe.serve.responses_models import CountInputRequest, Item, ResponsesRequest
from olmoe.serve.responses_output import ResponseWriter, new_id, response_object
from olmoe.serve.responses_store import ResponseStore, StoredResponse, listed
from olmoe.serve.sse import RESPONSES
from olmoe.serve.state import CallContext, ServerState

Event = dict[str, Any]


async def create(
    state: ServerState, body: ResponsesRequest, context: CallContext
) -> dict[str, Any] | AsyncGenerator[Event, None]:
    """The response, or its events if the body wants a stream. Raises `ApiError` before anything runs."""
    talk = await _conversation(state, body, context)
    chat = await _chat(state, body, talk)
    with renaming(CHAT_NAMES):
        prepared = await prepare_chat(state, chat, context)
    response = response_object(body, body.model or state.model_name)
    writer = ResponseWriter(
        response,
        describe=lambda each: _token(state, each),
        encode=lambda routing: wire.routing(routing, state.config.num_experts),
        logprobs=body.wants_logprobs,
        routing=bool(body.routing),
    )
    events = _events(state, prepared, writer, body, context, talk)
    if body.stream:
        return events
    async with aclosing(events):
        async for _ in events:
            pass
    return response


async def count_input(state: ServerState, body: CountInputRequest, context: CallContext) -> dict[str, Any]:
    """How many tokens the input of a response would have: POST /v1/responses/input_tokens."""
    state.check_model(body.model)
    chat = await _chat(state, body, await _conversation(state, body, context))
    with renaming(CHAT_NAMES):
        ids, _ = await chat_prompt(state, chat)
    return {"object": "response.input_tokens", "input_tokens": len(ids)}


@dataclass(frozen=True)
class _Conversation:
    """The conversation so far, what the request adds, and all of it as the body of a chat request."""

    history: tuple[Item, ...]
    own: list[Item]
    chat: dict[str, Any]


async def _conversation(state: ServerState, body: CountInputRequest, context: CallContext) -> _Conversation:
    """Translate a request. Raises `ApiError` for unsupported fields, and for references that lead nowhere."""
    check_fields(body)
    store = store_of(state)
    history: tuple[Item, ...] = ()
    if body.previous_response_id is not None:
        previous = store.get(context.owner, body.previous_response_id)
        if previous is None:
            raise invalid(
                f"The previous response {shown(body.previous_response_id)} is unknown, or was forgotten; send the "
                "conversation in input.",
                "previous_response_id",
                "previous_response_not_found",
            )
        history = previous.conversation

    def translate() -> _Conversation:
        refuse_what_we_lack(body)
        own = resolved(input_items(body), lambda item_id: store.item(context.owner, item_id))
        return _Conversation(history, own, chat_body(body, [*history, *own]))

    return await state.off_loop(translate)  # there may be thousands of items


def _with_id(item: Item) -> Item:
    if item.id is not None:
        return item
    prefix = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}.get(str(item.type), "msg")
    return item.model_copy(update={"id": new_id(prefix)})


async def _chat(state: ServerState, body: CountInputRequest, talk: _Conversation) -> ChatRequest:
    """The chat request; without the oldest messages if they do not fit and the body allows truncation."""
    chat = chat_request(talk.chat, CHAT_NAMES)
    if body.truncation != "auto":
        return chat
    answer = body.max_output_tokens if isinstance(body, ResponsesRequest) else None
    most = state.context_length - min(answer or state.context_length // 4, state.context_length // 2)

    async def fits(candidate: ChatRequest) -> bool:
        if len(candidate.messages) > most:
            return False
        with renaming(CHAT_NAMES):
            ids, _ = await chat_prompt(state, candidate)
        return len(ids) <= most

    if await fits(chat):
        return chat

    def without(cut: int) -> ChatRequest:
        return chat.model_copy(update={"messages": shortened(chat.messages, cut)})

    choices = cuts(chat.messages)
    low, high = 0, len(choices) - 1  # the smallest cut that fits is between them, or is the last
    while low < high:
        middle = (low + high) // 2
        if await fits(without(choices[middle])):
            high = middle
        else:
            low = middle + 1
    return without(choices[low]) if choices else chat


async def _events(
    state: ServerState,
    prepared: Prepared,
    writer: ResponseWriter,
    body: ResponsesRequest,
    context: CallContext,
    talk: _Conversation,
) -> AsyncGenerator[Event, None]:
    """All events of a response. It is stored before the last one: a client may continue from it at once."""
    for event in writer.start():
        yield event
    async with aclosing(chat_events(state, prepared)) as news:
        async for each in news:
            if isinstance(each, Finished) and not body.stream:
                state.check_end(each.reason, each.error)  # a stream reports it as a failed response
            for event in writer.write(each):
                yield event
    last = list(writer.end())
    if body.stored and writer.response["status"] != "failed":
        stored = StoredResponse(writer.response, talk.history, tuple(_with_id(item) for item in talk.own))
        store_of(state).add(context.owner, stored)
    for event in last:
        yield event


def _token(state: ServerState, logprob: TokenLogprob) -> dict[str, Any]:
    token: dict[str, Any] = wire.chat_logprobs(state.tokenizer, [logprob])["content"][0]
    return token


# ---- responses that are stored ----


def store_of(state: ServerState) -> ResponseStore:
    """The stored responses of a server."""
    if state.responses is None:
        state.responses = ResponseStore()
    store: ResponseStore = state.responses
    return store


def retrieve(state: ServerState, response_id: str, query: Mapping[str, str], owner: str) -> dict[str, Any]:
    """GET /v1/responses/{id}. Raises `ApiError` (404) if it is unknown."""
    if query.get("stream") in ("true", "1"):
        raise invalid("A stored response cannot be streamed; leave stream out.", "stream", "unsupported_parameter")
    return _found(state, response_id, owner).response


def delete(state: ServerState, response_id: str, query: Mapping[str, str], owner: str) -> dict[str, Any]:
    """DELETE /v1/responses/{id}. Raises `ApiError` (404) if it is unknown."""
    _found(state, response_id, owner)
    store_of(state).remove(owner, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def list_input(state: ServerState, response_id: str, query: Mapping[str, str], owner: str) -> dict[str, Any]:
    """GET /v1/responses/{id}/input_items: what a response answers, newest first, one page at a time."""
    items = listed(_found(state, response_id, owner).all_input)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid(f"order must be asc or desc, not {shown(order)}.", "order")
    if order == "desc":
        items.reverse()
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= 100):
        raise invalid(f"limit must be between 1 and 100, not {shown(limit)}.", "limit")
    if (after := query.get("after")) is not None:
        place = next((i for i, item in enumerate(items) if item.get("id") == after), None)
        if place is None:
            raise invalid(f"The response has no input item {shown(after)}.", "after")
        items = items[place + 1 :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


def _found(state: ServerState, response_id: str, owner: str) -> StoredResponse:
    stored = store_of(state).get(owner, response_id)
    if stored is None:
        raise ApiError(404, f"There is no response {shown(response_id)}, or it was forgotten.", param="response_id")
    return stored


ENDPOINTS = (
    DialectEndpoint(
        "/v1/responses", ResponsesRequest, create, "Answer a conversation (OpenAI's responses).", RESPONSES
    ),
    DialectEndpoint(
        "/v1/responses/input_tokens",
        CountInputRequest,
        count_input,
        "How many tokens the input of a response has.",
        RESPONSES,
        generates=False,
    ),
)
StoredAction = Callable[[ServerState, str, Mapping[str, str], str], dict[str, Any]]
_PAGES = {
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
}
# Actions on one stored response, by method and path: handler, summary, and schemas of the query.
STORED: dict[tuple[str, str], tuple[StoredAction, str, dict[str, Any]]] = {
    ("GET", "/v1/responses/{id}"): (retrieve, "A stored response.", {}),
    ("DELETE", "/v1/responses/{id}"): (delete, "Forget a stored response.", {}),
    ("GET", "/v1/responses/{id}/input_items"): (list_input, "What a stored response answers.", _PAGES),
}
