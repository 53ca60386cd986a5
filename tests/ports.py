"""Ports for servers that tests start, which nothing else on this machine gets meanwhile."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """A free port that a server may listen on, and that the system gives to nobody else until the block ends.

    A port that is merely free may be the end of somebody's connection when the server comes to listen on it.
    """
    with socket.socket() as probe:
        # With this option on both sides, Linux lets one of them listen on what the other has bound; others do not.
        if sys.platform == "linux":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        if sys.platform != "linux":
            probe.close()
        yield port
