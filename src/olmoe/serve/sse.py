"""Server-sent events: chunks of JSON as they come, comments in silence, and errors if a stream breaks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from olmoe.errors import UserError
from olmoe.serve.errors import ApiError, from_user_error

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_log = logging.getLogger("olmoe")
_COMMENT = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not hold chunks back
]
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True)
class Dialect:
    """How a protocol writes its events: named by their `type`, or unnamed with [DONE] at the end."""

    named: bool = False
    anthropic: bool = False  # errors are in its shape

    def event(self, chunk: dict[str, Any]) -> bytes:
        """One event. The JSON contains no newlines."""
        if self.named:
            return f"event: {chunk['type']}\ndata: {to_json(chunk)}\n\n".encode()
        return f"data: {to_json(chunk)}\n\n".encode()

    def error_body(self, error: ApiError) -> dict[str, Any]:
        """The body of an answer that is an error."""
        return error.anthropic_body() if self.anthropic else error.body()

    def error(self, error: ApiError) -> bytes:
        """An error in the middle of a stream: clients look for the key `error`."""
        body = self.error_body(error)
        return self.event({"type": "error", **body} if self.named else body)

    @property
    def end(self) -> bytes:
        """What closes a stream."""
        return b"" if self.named else b"data: [DONE]\n\n"


OPENAI = Dialect()
RESPONSES = Dialect(named=True)
ANTHROPIC = Dialect(named=True, anthropic=True)


class Stalled(Exception):
    """The client has stopped reading."""


class _Writer:
    """Sends parts of a body, and remembers when it last did."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._clock = asyncio.get_running_loop().time
        self.last = self._clock()
        self.since: float | None = None  # when a part started to wait for the client

    async def write(self, body: bytes, *, more: bool = True) -> None:
        self.since = self._clock()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self.last, self.since = self._clock(), None

    async def keep_alive(self, seconds: float, stall: float) -> None:
        """Send a comment whenever nothing was sent for `seconds`. Raises `Stalled` if the client stops reading."""
        while True:
            await asyncio.sleep(min(seconds, stall) / 2)
            now = self._clock()
            if self.since is not None:
                if now - self.since > stall:
                    raise Stalled
            elif now - self.last >= seconds / 2:
                await self.write(_COMMENT)


async def send_stream(
    send: Send, chunks: AsyncGenerator[dict[str, Any], None], dialect: Dialect, *, keep_alive: float, stall: float
) -> None:
    """Answer with a stream. However it ends, `chunks` is closed; an error is reported to the client."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    writer = _Writer(send)
    ticking = asyncio.ensure_future(writer.keep_alive(keep_alive, stall))
    main = asyncio.ensure_future(_write_all(writer, chunks, dialect))
    try:
        await asyncio.wait((ticking, main), return_when=asyncio.FIRST_COMPLETED)
        if not main.done():
            _log.warning("a client has not read its stream for %.0f s: ended", stall)
    finally:
        for task in (ticking, main):
            task.cancel()
        for task in (ticking, main):
            with suppress(asyncio.CancelledError, Stalled):
                await task


async def _write_all(writer: _Writer, chunks: AsyncGenerator[dict[str, Any], None], dialect: Dialect) -> None:
    try:
        async for chunk in chunks:
            await writer.write(dialect.event(chunk))
    except ApiError as error:
        await writer.write(dialect.error(error))
    except UserError as error:
        await writer.write(dialect.error(from_user_error(error)))
    except Exception:
        _log.exception("a stream failed")
        await writer.write(dialect.error(ApiError(500, "The server failed; its log says why.")))
    finally:
        await chunks.aclose()
    await writer.write(dialect.end, more=False)
