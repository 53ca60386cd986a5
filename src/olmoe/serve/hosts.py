"""The names that a server goes by: a page elsewhere must not reach it under a name that it was given for the purpose.

A page of evil.example can have its own name point to 127.0.0.1 once it is loaded ("DNS rebinding"). To the browser the
server on this machine is then of the page's own origin, and needs no permission to be read. It still sends the name.
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
    """The names that requests may be for; none if any will do.

    Those that were given; without any, `localhost` for a server that only this machine reaches and that asks for no
    key. One with a key is safe, since a browser does not know it, and one on other addresses has names of its own.
    Raises `UserError` for what is no name.
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
    """Answers 403 to requests for another host than `names`, `localhost`, or an address."""

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
        try:  # an address needs no name server that could lie
            ipaddress.ip_address(name[1:-1] if name[0] + name[-1] == "[]" else name)
        except ValueError:
            return False
        return True


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host.strip()) if host.count(":") == 1 or "]" in host else host.strip()
