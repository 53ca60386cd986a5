"""Who may call: keys, in `Authorization: Bearer` or `x-api-key`."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from olmoe.errors import UserError, shown
from olmoe.io.text_file import read_text
from olmoe.serve.endpoint import Receive, send_error
from olmoe.serve.errors import ApiError
from olmoe.serve.sse import ANTHROPIC, OPENAI, Send

VARIABLE = "OLMOE_API_KEY"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+|null")
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def read_keys(given: Iterable[str] = (), file: str | Path | None = None) -> tuple[str, ...]:
    """All keys: those given, those in a file (one per line, # for comments), and those in OLMOE_API_KEY (by commas).

    Raises `UserError` for a file that cannot be read or holds none, and for empty keys.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = [line.strip() for line in read_text(file).splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The file of API keys {file} cannot be read ({error}).") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UserError(f"The file of API keys {file} holds none; write one per line.")
        keys += found
    keys += [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    if any(not key.strip() for key in keys):
        raise UserError("An API key is empty; give at least one character, or leave --api-key out.")
    return tuple(dict.fromkeys(keys))


def check_origins(origins: Iterable[str]) -> None:
    """Raise `UserError` for an origin that no browser ever sends, and which would thus let nobody in."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UserError(
                f"--cors-origin must be * or an origin such as https://app.example.org, without a path and without a "
                f"trailing /, not {shown(origin)}."
            )


class Auth:
    """Admits callers with a key, or everybody if there are no keys. Each key has its own prefix cache, unless shared.

    `open_paths` need no key.
    """

    def __init__(
        self, app: Application, *, keys: Sequence[str], open_paths: Callable[[str], bool], share_prefixes: bool
    ) -> None:
        self._app, self._open, self._share = app, open_paths, share_prefixes
        self._digests = [hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest() for key in keys]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer 401, or pass the call on."""
        if scope["type"] == "http" and self._digests and not self._open(scope["path"]):
            digest = self._digest(scope["headers"])
            if digest is None:
                dialect = ANTHROPIC if scope["path"].startswith("/v1/messages") else OPENAI
                error = ApiError(
                    401,
                    "The API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key: KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await send_error(send, error, dialect, close=True)
                return
            scope["olmoe.owner"] = digest.hex()
            if not self._share:
                scope["olmoe.salt"] = digest.hex()
        await self._app(scope, receive, send)

    def _digest(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The digest of the caller's key, if it is one of ours. Compared in constant time."""
        for name, value in headers:
            key = None
            if name == b"x-api-key":
                key = value.strip()
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            if key is not None:
                digest = hashlib.sha256(key).digest()
                matches = [hmac.compare_digest(digest, ours) for ours in self._digests]
                if any(matches):
                    return digest
        return None
