"""A chat answer as events, which chat completions, responses and messages each translate into their own protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE
from olmoe.engine.request import Request, Routing, TokenLogprob
from olmoe.errors import UserError
from olmoe.serve.errors import ApiError, from_user_error, invalid
from olmoe.serve.protocol import ChatRequest, check_fields, limited, of_choice, salt_of, sampling_params
from olmoe.serve.state import CallContext, ServerState

Reason = Literal["stop", "length", "tool_calls", "error", "cancelled"]

# The engine's finish reasons -> their names in chats.
REASONS: dict[str, Reason] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "error": "error",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a choice, with what is reported about its tokens."""

    index: int
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A tool call that has started (`id` and `name` are set) or whose arguments have grown."""

    index: int
    call: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice. `error` is a sentence for "error"; `stop_string` is the stop string or id that ended it."""

    index: int
    reason: Reason
    error: str | None = None
    stop_string: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a call, all choices together; the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


ChatEvent = TextDelta | ToolCallDelta | Finished | Usage  # a Usage once, last


class ToolReader(Protocol):
    """Reads the text of one choice, which may contain tool calls, and interprets it.

    `read` may hold text back until its meaning is clear; `finish` releases it and ends the choice, with the reason
    "tool_calls" if there were any.
    """

    def read(self, delta: TextDelta) -> Sequence[TextDelta | ToolCallDelta]:
        """The events that the new text makes certain."""
        ...

    def finish(self, end: Finished) -> Sequence[TextDelta | ToolCallDelta | Finished]:
        """The remaining events, and the end of the choice."""
        ...


class ToolPlan(Protocol):
    """What `olmoe.serve.tools.plan(chat, tokenizer)` makes of a request with tools, or with a history of them.

    `messages` are in the form that the chat template takes, `template_tools` are for templates that write tools
    themselves, and `constraint` is what `olmoe.serve.structured` compiles if calls are constrained.
    """

    messages: list[dict[str, Any]]
    template_tools: list[dict[str, Any]] | None
    constraint: Any

    def reader(self, index: int) -> ToolReader | None:
        """A reader for a choice; None if its text is plain."""
        ...


@dataclass
class Prepared:
    """A chat whose prompt is tokenized and admitted, ready to run."""

    chat: ChatRequest
    requests: list[Request]
    plan: ToolPlan | None


async def run_chat(state: ServerState, chat: ChatRequest, context: CallContext) -> AsyncGenerator[ChatEvent, None]:
    """Prepare and run a chat: `events = await run_chat(...)`, then `async for event in events`.

    Awaiting it raises `ApiError` if something is wrong with the request, before any part of an answer is sent.
    """
    return chat_events(state, await prepare_chat(state, chat, context))


async def prepare_chat(state: ServerState, chat: ChatRequest, context: CallContext) -> Prepared:
    """Check and tokenize a chat, compile its grammar, and make sure that there is room for it. Raises `ApiError`."""
    check_fields(chat)
    state.check_open()
    state.check_model(chat.model)
    ids, plan = await chat_prompt(state, chat)
    ids = state.cut(chat, ids)
    grammar = await state.grammar(chat, None if plan is None else plan.constraint)
    room = max(min(state.context_length, state.engine.pool_tokens) - len(ids), 1)
    config, salt = state.config, salt_of(context.salt, chat)
    params = sampling_params(
        chat,
        room=room,
        texts=chat.choices,
        grammar=grammar,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
    )
    requests = []
    for choice in range(chat.choices):
        own = of_choice(params, choice)
        request = state.request(list(ids), own, param="messages", priority=chat.priority or 0, salt=salt)
        requests.append(limited(request, chat))
    state.admit(requests)
    state.metrics.asked(chat.choices, chat.limit)
    return Prepared(chat, requests, plan)


async def chat_prompt(state: ServerState, chat: ChatRequest) -> tuple[list[int], ToolPlan | None]:
    """The ids of a chat, and what to do about its tools. Raises `ApiError` (400) if the template refuses it."""
    most = state.context_length  # a limit for messages too, since each has at least one token
    if len(chat.messages) > most and chat.truncate_prompt_tokens is None:
        raise invalid(
            f"The prompt has {len(chat.messages)} messages, but the model's context ends at {most} tokens; shorten it.",
            "messages",
        )
    # In a thread: schemas, calls and texts can be as large as a body.
    return await state.off_loop(_planned, state, chat)


async def chat_events(state: ServerState, prepared: Prepared) -> AsyncGenerator[ChatEvent, None]:
    """The events of a prepared chat. Closing the iterator early aborts its requests."""
    requests = prepared.requests
    readers = [prepared.plan.reader(i) if prepared.plan else None for i in range(len(requests))]
    async with aclosing(state.generate(requests)) as deltas:
        async for index, delta in deltas:
            reader = readers[index]
            if delta.text or delta.token_ids:
                event = TextDelta(index, delta.text, delta.logprobs, delta.token_ids, delta.routing)
                if reader is None:
                    yield event
                else:
                    for read in reader.read(event):
                        yield read
            if delta.finish_reason is not None:
                end = Finished(index, REASONS[delta.finish_reason], delta.error, delta.request.stop)
                if reader is None:
                    yield end
                else:
                    for last in reader.finish(end):
                        yield last
    yield usage(requests)


def usage(requests: Sequence[Request], prompts: int = 1, generated: int | None = None) -> Usage:
    """The tokens of requests, where each group of `len(requests) / prompts` shares one prompt.

    `generated` is the number of generated tokens that the client knows of, in place of the engine's count.
    """
    each = len(requests) // prompts
    firsts = requests[::each]
    return Usage(
        sum(len(request.prompt_ids) for request in firsts),
        sum(len(request.token_ids) for request in requests) if generated is None else generated,
        sum(request.cached_tokens for request in firsts),
    )


# ---- the prompt ----


def template_messages(chat: ChatRequest | list[dict[str, Any]], own_template: bool) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: text parts joined, "developer" as "system". Raises `ApiError` (400).

    A role that OpenAI does not have is left to the checkpoint's `own_template`, if any; OLMoE's drops such messages.
    """
    given = chat.messages if isinstance(chat, ChatRequest) else chat
    if not given:
        raise invalid("messages is empty; a chat needs at least one message.", "messages")
    messages = []
    for index, message in enumerate(given):
        role = message.get("role")
        param = f"messages[{index}]"
        if not isinstance(role, str) or (role not in _ROLES and not own_template):
            raise invalid(f"{param}.role must be one of {', '.join(_ROLES)}.", f"{param}.role")
        content = _text_content(message.get("content"), param)
        if content is None:
            if role != "assistant":
                raise invalid(f"{param}.content is missing; give a text.", f"{param}.content")
            content = ""
        messages.append({**message, "role": "system" if role == "developer" else role, "content": content})
    return messages


def _text_content(content: Any, param: str) -> str | None:
    """The text of a message, its parts joined by newlines; None if there is none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{param}.content must be a text or a list of text parts.", f"{param}.content")
    texts = []
    for index, part in enumerate(content):
        text = part if isinstance(part, str) else None
        if isinstance(part, dict):
            text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise invalid(
                f"{param}.content[{index}] is of the type {str(kind)[:50]!r}; the model reads only text.",
                f"{param}.content[{index}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _planned(state: ServerState, chat: ChatRequest) -> tuple[list[int], ToolPlan | None]:
    plan = _tool_plan(state, chat)
    try:
        return _prompt_ids(state, chat, plan), plan
    except UserError as error:
        found = from_user_error(error)
    except ApiError as error:
        found = error
    found.param = found.param or "messages"
    raise found


def _prompt_ids(state: ServerState, chat: ChatRequest, plan: ToolPlan | None) -> list[int]:
    own_template = state.tokenizer.chat_template not in (None, OLMOE_CHAT_TEMPLATE)
    messages = template_messages(chat if plan is None else plan.messages, own_template)
    continued = bool(chat.continue_final_message)
    variables = dict(chat.chat_template_kwargs or {})
    for name in ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"):
        if name in variables:
            raise invalid(
                f"chat_template_kwargs holds {name!r}, which is a field of the request.", "chat_template_kwargs"
            )
    text = state.tokenizer.render_chat(
        messages,
        add_generation_prompt=chat.add_generation_prompt if chat.add_generation_prompt is not None else not continued,
        continue_final_message=continued,
        tools=plan.template_tools if plan else None,
        documents=chat.documents,
        **variables,
    )
    if chat.truncate_prompt_tokens is None:
        state.check_length(text, "messages")
    return state.tokenizer.encode_rendered(text)


def _tool_plan(state: ServerState, chat: ChatRequest) -> ToolPlan | None:
    """What to do about tools, if the chat has any."""
    history = any(message.get("tool_calls") or message.get("role") in ("tool", "function") for message in chat.messages)
    if not (chat.tools or history) and chat.tool_choice in (None, "none", "auto"):
        return None
    from olmoe.serve import tools  # which imports this module

    return tools.plan(chat, state.tokenizer)
