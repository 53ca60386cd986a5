"""A program in a pseudo-terminal, for tests of what people do with keys."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

ENTER, ALT_ENTER, CTRL_C, CTRL_D, TAB = "\r", "\x1b\r", "\x03", "\x04", "\t"
_SEQUENCES = re.compile(r"\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b\][^\x07]*\x07|\x1b[=>78]")


class Terminal:
    """`python -c CODE ARGUMENTS` that believes to talk to a person. Leaving the block ends it."""

    def __init__(self, code: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.shown = ""
        self._raw = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_control,  # Ctrl-C then reaches it as a signal
            env=os.environ
            | {
                "TERM": "xterm",
            }
            | environment,
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def keys(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        """What is shown up to the end of the first match after what was awaited before."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.shown!r}"
            assert self._read(0.2) or self.process.poll() is None, f"it ended; {pattern!r} is not in {self.shown!r}"
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self._read(0.1)
            assert time.monotonic() < deadline, f"it still runs: {self.shown!r}"
        while self._read(0.1):
            pass
        return self.process.returncode

    def _read(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        for _ in range(data.count(b"\x1b[6n")):  # where is the cursor?
            os.write(self._fd, b"\x1b[1;1R")
        self._raw += data
        cut = self._raw.rfind(b"\x1b") if b"\x1b" in self._raw[-12:] else len(self._raw)  # within a sequence, perhaps
        if _SEQUENCES.match(self._raw[cut:].decode("utf-8", errors="replace")):
            cut = len(self._raw)
        ready, self._raw = self._raw[:cut], self._raw[cut:]
        self.shown += _SEQUENCES.sub("", ready.decode("utf-8", errors="replace")).replace("\r", "")
        return bool(data)


def _control() -> None:
    """Make the terminal on stdin the controlling one."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
