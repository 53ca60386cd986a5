"""Running the application: the socket before the weights, our own signal handling, draining before the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn

from olmoe.errors import UserError
from olmoe.serve.app import make_app
from olmoe.serve.connection import connections
from olmoe.serve.state import ServerState, ServeSettings

_log = logging.getLogger("olmoe")
# Clients keep connections open for their next request; if we close one first, they lose that request.
_IDLE_SECONDS = 120
# Seconds after the second signal to tell clients about the end.
_LAST_WORDS = 2.0
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Taken before the weights are loaded, so that a port in use shows at once.

    Clients that connect before the server runs wait. Raises `UserError` for an address that cannot be used.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"The port must be between 0 and 65535, not {port}.")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"The host {host!r} is unknown ({error}); use 127.0.0.1, or 0.0.0.0 for all.") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere this lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        code = error.errno
        if code == errno.EADDRINUSE:
            raise UserError(f"Port {port} of {host} is in use; choose another with --port, 0 for any.") from None
        if code in (errno.EACCES, errno.EPERM):
            raise UserError(f"Port {port} of {host} is not permitted to this user; choose one above 1023.") from None
        if code == errno.EADDRNOTAVAIL:
            raise UserError(f"{host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all.") from None
        raise UserError(f"Port {port} of {host} cannot be used ({error}); choose another with --port.") from None
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket, settings: ServeSettings) -> str:
    """The URL of the page."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{shown}:{port}"


def check_tls(settings: ServeSettings) -> None:
    """Raise `UserError` for certificates that cannot be used, before anything else is done."""
    if settings.ssl_keyfile is not None and settings.ssl_certfile is None:
        raise UserError("--ssl-keyfile needs --ssl-certfile, the certificate that it belongs to; add it.")
    if settings.ssl_certfile is None:
        return
    encrypted = False

    def password() -> str:  # otherwise OpenSSL asks for it on the terminal, and waits
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password)
    except (OSError, ssl.SSLError) as error:
        if encrypted:
            key = settings.ssl_keyfile or settings.ssl_certfile
            raise UserError(
                f"The key in {key} is encrypted; decrypt it, with openssl pkey -in {key} -out FILE."
            ) from None
        raise UserError(
            f"The certificate {settings.ssl_certfile} and its key cannot be used ({error}); give PEM files that belong "
            "together, with --ssl-certfile and --ssl-keyfile."
        ) from None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, which end the program in their own way."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server, on a socket that is already listening. `run` returns when it has ended.

    The first `stop` drains: new requests are refused, running ones finish. The second ends those as well, and tells
    their clients.
    """

    def __init__(self, state: ServerState, listener: socket.socket) -> None:
        self.state, self._listener = state, listener
        settings = state.settings
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                make_app(state),
                http=connections(settings.body_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level=logging.INFO if settings.access_log else logging.WARNING,
                access_log=settings.access_log,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=5,
                backlog=_BACKLOG,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
            )
        )
        self._stops = 0
        self._ending: asyncio.Task[None] | None = None

    def run(self, *, signals: bool = True, begun: Callable[[], None] = lambda: None) -> None:
        """Serve until stopped, by SIGINT or SIGTERM if `signals` are to be handled (only in the main thread).

        `begun` is called once signals are handled.
        """
        try:
            asyncio.run(self._serve(signals, begun))
        finally:
            self.state.close()

    async def _serve(self, signals: bool, begun: Callable[[], None]) -> None:
        loop = self.loop = asyncio.get_running_loop()
        loop.set_exception_handler(_Quietly())
        if signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError):  # Windows
                    loop.add_signal_handler(number, self.stop)
        begun()
        await self._uvicorn.serve(sockets=[self._listener])

    def stop(self) -> None:
        """Drain; if called again, end at once. Must be called on the event loop."""
        self._stops += 1
        running = "1 request" if self.state.calls == 1 else f"{self.state.calls} requests"
        if self._stops == 1:
            self.state.draining = True
            if self.state.calls:
                _log.warning("stopping after the answers in progress (%s); a second signal stops at once", running)
            self._ending = asyncio.ensure_future(self._drain())
        elif self._stops == 2:
            if self.state.calls:
                _log.warning("ending %s", running)
            self.state.abort_all()
            asyncio.get_running_loop().call_later(_LAST_WORDS, self._force)

    async def _drain(self) -> None:
        while self.state.calls:
            await asyncio.sleep(0.02)
        self._uvicorn.should_exit = True

    def _force(self) -> None:
        self._uvicorn.should_exit = self._uvicorn.force_exit = True


class _Quietly:
    """Logs no traceback for broken connections, and at most one line per minute if there is no room for new ones."""

    def __init__(self) -> None:
        self._said = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            if loop.time() - self._said > 60:
                self._said = loop.time()
                _log.warning("too many open files, so new connections wait; raise the limit with ulimit -n")
        elif not isinstance(error, ConnectionError):
            loop.default_exception_handler(context)


def allow_connections(most: int = 2**16) -> None:
    """Let this process have as many connections as the system allows, instead of the traditional 1024."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
