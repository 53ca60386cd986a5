"""`Stream`: one text as it is generated, piece by piece. No torch."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from types import TracebackType

from olmoe.engine.request import Completion, Request, Statistics


class Stream:
    """An iterator over the pieces of one text.

    `statistics` is updated as it goes. `completion` is None while the text grows, and set once it has ended: at its
    end or, with the finish reason "cancelled" and the text so far, after the loop over it was left, after `close`, or
    after an error. A loop that was left can be resumed, but not after `close`.

    >>> with llm.stream("Once upon a time") as stream:      # doctest: +SKIP
    ...     for piece in stream:
    ...         print(piece, end="")
    """

    def __init__(
        self,
        request: Request,
        pieces: Generator[str, None, None],
        statistics: Statistics,
    ) -> None:
        self.statistics = statistics
        self.completion: Completion | None = None
        self._request, self._pieces = request, pieces
        self._closed = False
        # A stream left unfinished when Python exits would be closed after torch is gone, with an error message.
        weakref.finalize(self, _close, pieces)

    def __next__(self) -> str:
        """The next piece. Raises `StopIteration` at the end of the text, and after `close`."""
        self.completion = None
        try:
            piece = next(self._pieces)
        except BaseException:  # the end included
            self._settle()
            raise
        if self._closed:  # meanwhile, from another thread
            self.close()
            raise StopIteration
        return piece

    def __iter__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> Iterator[str]:
        """All remaining pieces."""
        try:
            while True:
                try:
                    piece = next(self)
                except StopIteration:
                    return
                yield piece
        finally:
            if not _is_finalizing():  # else modules are gone already, and nobody will ask
                self._settle()

    def close(self) -> None:
        """Stop generating, and free the resources. May be called twice, and from another thread."""
        self._closed = True
        _close(self._pieces)
        self._settle()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _settle(self) -> None:
        self.completion = self._request.completion()


def _close(pieces: Generator[str, None, None]) -> None:
    # A generator that is running in another thread cannot be closed; its reader closes it.
    with contextlib.suppress(ValueError):
        pieces.close()
