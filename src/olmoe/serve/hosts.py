"""The host names of a server: a foreign page must not reach it under a name made up for the purpose.

Once loaded, a page of evil.example can make its own name point to 127.0.0.1 ("DNS rebinding"). To the browser, the
server on this machine then belongs to the page's own origin, and the page may read it. But the browser still sends the
name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from olmoe.errors import UserError, shown
from olmoe.serve.auth import Application
from olmoe.serve.endpoint import Receive, send_error
from olmoe.serve.errors import ApiError
from olmoe.serve.sse import ANTHROPIC, OPENAI, Send

ANY = "*"
_LOCAL = "localhost"
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == _LOCAL


def names_to_check(given: Iterable[str], host: str, *, keys: bool) -> tuple[str, ...]:
    """The names that requests may use; none if any will do.

    These are the names given; without any, `localhost` for a server that only this machine reaches and that requires no
    key. A server with a key is safe, since a browser does not know the key, and one on other addresses has own names.
    Raises `UserError` for anything that is not a name.
    """
    names = tuple(name.lower().rstrip(".") for name in given)
    for name in names:
        if name != ANY and not _NAME.fullmatch(name):
            raise UserError(
                "--allowed-host must be a name such as llm.example.org, without scheme and port, *.example.org for "
                f"all below it, or * for any, not {shown(name)}."
            )
    if ANY in names:
        return ()
    return names or ((_LOCAL,) if is_loopback(host) and not keys else ())


class Hosts:
    """Answers 403 to requests for a host other than `names`, `localhost`, or an address."""

    def __init__(self, app: Application, *, names: Sequence[str]) -> None:
        self._app = app
        self._names = frozenset(names)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer 403, or pass the call on."""
        if scope["type"] == "http":
            name = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            if not self._is_ours(_without_port(name).lower().rstrip(".")):
                message = (
                    f"This server does not go by the name {shown(name)}; start it with --allowed-host to allow it."
                )
                dialect = ANTHROPIC if scope["path"].startswith("/v1/messages") else OPENAI
                await send_error(send, ApiError(403, message), dialect, close=True)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, name: str) -> bool:
        if name in ("", _LOCAL) or name.endswith(f".{_LOCAL}") or name in self._names:  # all browsers send one
            return True
        parts = name.split(".")
        if any(f"*.{'.'.join(parts[i:])}" in self._names for i in range(1, len(parts))):
            return True
        try:  # an address involves no name server, which could lie
            ipaddress.ip_address(name[1:-1] if name[0] + name[-1] == "[]" else name)
        except ValueError:
            return False
        return True


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host.strip()) if host.count(":") == 1 or "]" in host else host.strip()
