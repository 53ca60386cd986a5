"""POST /v1/completions: continue texts or token ids, with the log-probabilities of prompts and texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from olmoe.engine.request import Delta, FinishReason, Request, Routing
from olmoe.serve import wire
from olmoe.serve.chat_run import usage
from olmoe.serve.errors import invalid
from olmoe.serve.protocol import CompletionRequest, check_fields, limited, of_choice, salt_of, sampling_params
from olmoe.serve.state import CallContext, ServerState

_REASONS: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class _Choice:
    """One text in progress."""

    index: int
    request: Request
    echoed: str
    logprobs: wire.LegacyLogprobs | None
    begun: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    scored: dict[str, Any] | None = None
    reason: str | None = None


@dataclass
class _Call:
    """A call that is ready to run."""

    state: ServerState
    body: CompletionRequest
    choices: list[_Choice]
    prompts: int
    head: dict[str, Any]


async def create(
    state: ServerState, body: CompletionRequest, context: CallContext
) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
    """The answer, or its chunks if the body wants a stream. Raises `ApiError` before anything runs."""
    call = await _prepare(state, body, context)
    return _stream(call) if body.stream else await _whole(call)


async def _prepare(state: ServerState, body: CompletionRequest, context: CallContext) -> _Call:
    check_fields(body)
    state.check_open()
    state.check_model(body.model)
    if body.limit == 0 and not body.echo and body.prompt_logprobs is None and not body.prompt_routing:
        raise invalid("max_tokens is 0, which requests nothing; set echo to score the prompt.", "max_tokens")
    given = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    if len(given) * body.choices > state.settings.max_queued_requests:
        most = state.settings.max_queued_requests
        raise invalid(f"One call asks for {len(given) * body.choices} texts, more than the {most} allowed.", "prompt")
    encoded = iter(await state.off_loop(_encode, state, given, body.truncate_prompt_tokens is None))
    grammar = await state.grammar(body)
    salt, config = salt_of(context.salt, body), state.config
    params = sampling_params(
        body,
        room=state.context_length,
        texts=len(given) * body.choices,
        grammar=grammar,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
    )
    choices: list[_Choice] = []
    for number, prompt in enumerate(given):
        ids = state.cut(body, next(encoded) if isinstance(prompt, str) else prompt)
        where = _where(number, given)
        echoed = ""
        if body.echo:
            kept = isinstance(prompt, str) and body.truncate_prompt_tokens is None
            echoed = prompt if kept else state.tokenizer.decode(ids, skip_special_tokens=False)
        for choice in range(body.choices):
            own = of_choice(params, choice)
            request = state.request(ids, own, param=where, priority=body.priority or 0, salt=salt)
            legacy = None if body.logprobs is None else wire.LegacyLogprobs(state.tokenizer, body.logprobs)
            choices.append(_Choice(len(choices), limited(request, body), echoed, legacy))
    state.admit([choice.request for choice in choices])
    state.metrics.asked(body.choices, body.limit)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or state.model_name,
    }
    return _Call(state, body, choices, len(given), head)


def _where(number: int, given: Sequence[Any]) -> str:
    return f"prompt[{number}]" if len(given) > 1 else "prompt"


def _encode(state: ServerState, given: Sequence[Any], whole: bool) -> list[list[int]]:
    """The ids of the prompts, texts tokenized. Raises `ApiError` for one that is far too long, if all of it is used."""
    texts = []
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            if whole:
                state.check_length(prompt, _where(number, given))
            texts.append(prompt)
    return state.tokenizer.encode_batch(texts) if texts else []


async def _whole(call: _Call) -> dict[str, Any]:
    requests = [choice.request for choice in call.choices]
    async with aclosing(call.state.generate(requests)) as deltas:
        async for index, delta in deltas:
            _add(call, call.choices[index], delta)
    answers = []
    for choice in call.choices:
        answer = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": choice.scored,
            "finish_reason": choice.reason,
            "stop_reason": choice.request.stop,
        }
        if call.body.return_token_ids:
            answer["token_ids"] = choice.token_ids
        if call.body.routing:
            answer["routing"] = wire.routing(choice.routing, call.state.config.num_experts)
        answers.append(answer | _of_prompt(call, choice.request))
    total = usage(requests, call.prompts)
    return {**call.head, "choices": answers, "usage": wire.usage_dict(total)}


def _add(call: _Call, choice: _Choice, delta: Delta) -> None:
    """Add a delta to a choice, the echoed prompt first."""
    text, scored = _news(call, choice, delta)
    choice.text += text
    if scored is not None:
        choice.scored = wire.joined(choice.scored, scored)
    choice.token_ids += delta.token_ids
    choice.routing += delta.routing
    choice.reason = _reason(call.state, delta)


def _news(call: _Call, choice: _Choice, delta: Delta) -> tuple[str, dict[str, Any] | None]:
    """The text and the log-probabilities of a delta, after those of an echoed prompt if it is the first."""
    text, scored = delta.text, None
    if not choice.begun:
        choice.begun = True
        if call.body.echo:
            text = choice.echoed + text
            request = choice.request
            if choice.logprobs is not None and request.prompt_logprobs:
                scored = choice.logprobs.prompt(request.prompt_ids, request.prompt_logprobs, choice.echoed)
    if choice.logprobs is not None and (delta.logprobs or (delta.finish_reason and scored is None)):
        scored = wire.joined(scored, choice.logprobs.part(delta.logprobs))
    return text, scored


def _of_prompt(call: _Call, request: Request) -> dict[str, Any]:
    """What is reported about the prompt, if requested."""
    found: dict[str, Any] = {}
    if call.body.prompt_logprobs is not None:
        found["prompt_logprobs"] = wire.prompt_logprobs(call.state.tokenizer, request.prompt_logprobs)
    if call.body.prompt_routing:
        found["prompt_routing"] = wire.routing(request.prompt_routing, call.state.config.num_experts)
    if call.body.return_token_ids:
        found["prompt_token_ids"] = request.prompt_ids
    return found


def _reason(state: ServerState, delta: Delta) -> str | None:
    """The `finish_reason` of a choice, None before its end. Raises `ApiError` for an end that is an error."""
    if delta.finish_reason is None:
        return None
    state.check_end(delta.finish_reason, delta.error)
    return _REASONS[delta.finish_reason]


async def _stream(call: _Call) -> AsyncGenerator[dict[str, Any], None]:
    body, state, head = call.body, call.state, call.head
    requests = [choice.request for choice in call.choices]
    running, silent = body.wants_running_usage, not (body.return_token_ids or body.routing)
    tail: dict[str, Any] = {"usage": None} if body.wants_usage else {}
    told = 0  # tokens sent so far: the engine may be ahead
    async with aclosing(state.generate(requests)) as deltas:
        async for index, delta in deltas:
            choice = call.choices[index]
            first = not choice.begun
            told += len(delta.token_ids)
            text, scored = _news(call, choice, delta)
            reason = _reason(state, delta)
            if silent and not (text or scored or reason or first):
                continue  # bytes of an unfinished character
            answer: dict[str, Any] = {"index": index, "text": text, "logprobs": scored, "finish_reason": reason}
            if reason is not None:
                answer["stop_reason"] = choice.request.stop
            if body.return_token_ids:
                answer["token_ids"] = delta.token_ids
            if body.routing:
                answer["routing"] = wire.routing(delta.routing, state.config.num_experts)
            if first:
                answer |= _of_prompt(call, choice.request)
            if running:
                tail = {"usage": wire.usage_dict(usage(requests, call.prompts, told))}
            yield {**head, "choices": [answer], **tail}
    if body.wants_usage:
        yield {**head, "choices": [], "usage": wire.usage_dict(usage(requests, call.prompts))}
