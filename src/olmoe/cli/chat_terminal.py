"""The terminal of `olmoe chat`: reads messages with editing, history and line breaks; Ctrl-C stops an answer."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

PROMPT, CONTINUED = "> ", "| "
_HISTORY = "chat_history"


class Reader:
    """Asks for messages. `history` is a file that keeps them; None keeps them for this run only."""

    def __init__(self, commands: Sequence[str], status: Callable[[], str], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        self._session: Any = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_key_bindings(),
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            bottom_toolbar=status,
        )

    def read(self) -> str:
        """The next message. Raises `EOFError` at Ctrl-D and `KeyboardInterrupt` at Ctrl-C."""
        text: str = self._session.prompt()
        return text


def _key_bindings() -> Any:
    """Enter sends, unless a backslash ends the line; Alt-Enter starts another line."""
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_char == "" and buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


def history_file() -> Path | None:
    """The file of messages typed earlier, readable by its owner only; None if it cannot be written."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~")
    else:
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(base) / "olmoe" / _HISTORY
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return None
    return path


class Interruptible:
    """A context in which Ctrl-C sets `stopped` and lets the model finish its step, so that its cache stays valid.

    A second one interrupts the model, and so does the first as long as nothing of the answer is there: a long prompt
    may take a while.
    """

    stopped = begun = False

    def __enter__(self) -> Interruptible:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        waits, self.stopped = self.begun and not self.stopped, True
        if not waits:
            raise KeyboardInterrupt


def show_answer(pieces: Iterator[str], write: Callable[[str], None]) -> bool:
    """Write an answer as it comes; return whether it was finished, and not stopped by Ctrl-C."""
    with Interruptible() as interrupt:
        try:
            for piece in pieces:
                interrupt.begun = True
                write(harmless(piece))
                if interrupt.stopped:
                    break
        except KeyboardInterrupt:
            interrupt.stopped = True
        finally:
            with contextlib.suppress(AttributeError):
                pieces.close()  # type: ignore[attr-defined]
    return not interrupt.stopped


def harmless(text: str) -> str:
    """`text` without characters that control a terminal: a model may write escape sequences."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)
