"""A connection, as uvicorn and httptools read it, that limits the head of a request and ignores upgrades.

Clients of HTTP/1.0, some proxies among them, get answers they can read.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# The request line and the headers. No real client of this server would send larger ones.
MOST_HEAD_BYTES = 2**16
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)
# Headers that request another protocol. Java's HttpClient and `curl --http2` send them with every first request; a
# server may ignore them, but httptools takes everything after such a head, body included, for the other protocol.
_UPGRADES = (b"upgrade", b"http2-settings")


class Connection(HttpToolsProtocol):
    """One client's connection.

    The head of a request must arrive within `head_timeout` seconds and have at most `MOST_HEAD_BYTES`; a connection on
    which nothing arrives is closed like one that idles between two requests. Bodies have their own limits in
    `olmoe.serve.endpoint`.
    """

    head_timeout = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        self._disarm()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of one or several requests have arrived."""
        self._unset_keepalive_if_required()
        begun = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
            return
        self._head_bytes = self._head_bytes + len(data) if begun and self._in_head else 0
        if self._head_bytes > MOST_HEAD_BYTES:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._head_timer is None and (self._in_head or not self._answering):
            self._head_timer = self.loop.call_later(self.head_timeout, self._head_is_late)

    def on_message_begin(self) -> None:
        """The head of a request has started."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_head = False
        self._disarm()
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is complete too."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        super()._start_asgi_task(cycle, _unframed(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _without_upgrade(self, rest: bytes) -> None:
        """Read the head that has just arrived again, as if it requested no other protocol, and then what follows it."""
        method = self.parser.get_method()
        if method == b"CONNECT":  # an upgrade by itself
            self.send_400_response("This server is not a proxy.")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _UPGRADES)
            if name not in _UPGRADES and not (name == b"connection" and not value):
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._answering:  # an earlier request, which must not suffer
            self._head_timer = self.loop.call_later(self.head_timeout, self._head_is_late)
        else:
            self.transport.close()

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _unframed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """The application for a client of HTTP/1.0, which knows no chunks: an answer of unknown length ends with the
    connection.
    """

    async def run(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        measured = True

        async def plain(message: ASGISendEvent) -> None:
            nonlocal measured
            if message["type"] == "http.response.start":
                measured = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not measured:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and not measured:
                cycle.expected_content_length = len(message.get("body", b""))  # so uvicorn's check passes
            await send(message)

        await app(scope, receive, plain)

    return run


def connections(head_timeout: float) -> type[Connection]:
    """The class for `uvicorn.Config(http=...)`, which makes the connections."""
    return type("Connection", (Connection,), {"head_timeout": head_timeout})
