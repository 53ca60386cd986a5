"""A POST endpoint: reads the body, checks the model, sends an answer or a stream; stops when the client hangs up."""

from __future__ import annotations

import asyncio
import codecs
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from olmoe.errors import UserError, shown
from olmoe.serve.errors import ApiError, from_user_error, invalid, overloaded
from olmoe.serve.sse import OPENAI, Dialect, Send, send_stream, to_json
from olmoe.serve.state import CallContext, ServerState

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Answer = dict[str, Any] | AsyncGenerator[dict[str, Any], None]
Create = Callable[[ServerState, Any, CallContext], Awaitable[Answer]]

_log = logging.getLogger("olmoe")
# Larger bodies are parsed in a thread.
_LARGE = 2**16
# While waiting for a body, how often, in seconds, to check whether the server is shutting down.
_LOOK_UP = 0.5
# Parts of a pydantic location that name a type, not a field.
_TYPES = frozenset("str int float bool dict list none StreamOptions".split())


class Gone(Exception):
    """The client hung up while sending its request."""


async def send_json(
    send: Send, status: int, body: dict[str, Any], headers: dict[str, str] | None = None, *, close: bool = False
) -> None:
    """Answer with a JSON object."""
    content = to_json(body).encode("utf-8", errors="replace")
    sent = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    if close:
        sent["connection"] = "close"
    encoded = [(name.lower().encode(), value.encode("latin-1", errors="replace")) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def send_error(send: Send, error: ApiError, dialect: Dialect = OPENAI, *, close: bool = False) -> None:
    """Answer with an error."""
    await send_json(send, error.status, dialect.error_body(error), error.headers, close=close)


@dataclass(frozen=True)
class Endpoint:
    """One POST route. As an ASGI application it answers a request; `create` alone serves callers without HTTP."""

    path: str
    model: type[BaseModel]
    create: Create
    summary: str
    dialect: Dialect = OPENAI
    generates: bool = True  # whether it needs the engine, and streams

    async def serve(self, state: ServerState, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = False

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        state.calls += 1
        read = False
        try:
            content = await _read_body(scope, receive, state)
            read = True
            await _until_gone(self._answer(state, scope, content, note), receive)
        except Gone:
            return
        except ApiError as error:
            if not started:
                await send_error(send, error, self.dialect, close=not read or state.draining)
        except Exception:
            _log.exception("a request to %s failed", self.path)
            if not started:
                await send_error(send, ApiError(500, "The server failed; its log says why."), self.dialect)
        finally:
            state.calls -= 1

    async def _answer(self, state: ServerState, scope: MutableMapping[str, Any], content: bytes, send: Send) -> None:
        if self.generates:
            state.check_open()
        if len(content) > _LARGE:
            body = await state.off_loop(self.parse, content)
        else:
            body = self.parse(content)
        context = CallContext(scope.get("olmoe.salt", ""), scope.get("olmoe.owner", ""))
        try:
            answer = await self.create(state, body, context)
        except UserError as error:
            raise from_user_error(error) from None
        if isinstance(answer, dict):
            await send_json(send, 200, answer)
        else:
            settings = state.settings
            await send_stream(send, answer, self.dialect, keep_alive=settings.keep_alive, stall=settings.stall_timeout)

    def parse(self, content: bytes) -> BaseModel:
        """The body as its model. Raises `ApiError` (400) with the field that is wrong."""
        try:
            return self.model.model_validate_json(content)
        except ValidationError as error:
            # The input can be as large as the body, and takes as long to copy.
            small = len(content) <= _LARGE
            first = error.errors(include_url=False, include_context=False, include_input=small)[0]
            if first["type"] == "json_invalid":
                raise invalid(f"The body is not valid JSON ({first['msg']}).") from None
            param = _location(first["loc"])
            value = "" if first["type"] == "missing" or not small else f", not {shown(first['input'])}"
            message = first["msg"].removeprefix("Value error, ")
            raise invalid(f"{param}: {message}{value}." if param else f"{message}{value}.", param or None) from None


def _location(parts: tuple[int | str, ...]) -> str:
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in _TYPES and "[" not in part:
            text += f".{part}" if text else part
    return text


async def _read_body(scope: MutableMapping[str, Any], receive: Receive, state: ServerState) -> bytes:
    """The body, which must be JSON by its headers and not too large. Raises `ApiError`, or `Gone`."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    settings = state.settings
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    # A page of another origin can send a form or plain text without a preflight request, but not JSON.
    if not (kind == b"application/json" or kind.endswith(b"+json") or (not kind and b"origin" not in headers)):
        raise ApiError(415, f"The content type must be application/json, not {shown(kind.decode('latin-1'))}.")
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"", b"identity"):
        raise ApiError(415, f"The body must not be compressed ({shown(coding.decode('latin-1'))}); send it as it is.")
    too_large = ApiError(413, f"The body is larger than the {settings.max_body_bytes} bytes that are allowed.")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > settings.max_body_bytes:
        raise too_large
    parts, size = [], 0
    while True:
        message = await _part(receive, state)
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        size += len(part)
        if size > settings.max_body_bytes:
            raise too_large
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts).removeprefix(codecs.BOM_UTF8)


async def _part(receive: Receive, state: ServerState) -> MutableMapping[str, Any]:
    """The next part of a body. Raises `ApiError` if it takes too long: a shutdown does not wait for bodies."""
    clock = asyncio.get_running_loop().time
    until = clock() + state.settings.body_timeout
    while True:
        message = None
        try:
            async with asyncio.timeout(min(until - clock(), _LOOK_UP)):
                message = await receive()
        except TimeoutError:
            if clock() >= until:
                raise ApiError(408, f"The body did not come within {state.settings.body_timeout:.0f} s.") from None
        if state.draining and (message is None or message.get("more_body", False)):
            raise overloaded("The server is shutting down; send the request to another.", 5)
        if message is not None:
            return message


async def _until_gone(work: Any, receive: Receive) -> None:
    """Do the work; if the client hangs up before it is done, cancel it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
