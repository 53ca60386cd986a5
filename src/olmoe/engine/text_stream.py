"""From generated ids to text that may be shown: whole characters, nothing that may yet be a stop string. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from olmoe.tokenizer import IncrementalDetokenizer, Tokenizer


class TextStream:
    """Feed ids with `add`; `text` grows by what each call returns; `stopped` turns true at a stop string.

    The text ends before the stop string that is complete first (of two complete at once, the longer), so
    that it does not depend on how the characters were split into tokens; with `include_stop` it ends after it.
    `stop_string` is the one that was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held, self._include = "", include_stop
        self.stopped, self.stop_string = False, ""
        self.text = ""

    def add(self, token_id: int) -> str:
        """The text that this id makes certain; empty after `stopped`."""
        return self._release(self._detokenizer.add(token_id), final=False)

    def finish(self) -> str:
        """The rest of the text once generation has ended."""
        return self._release(self._detokenizer.finish(), final=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            self.text += new
            return new
        self._held += new
        found = [(place + len(s), place) for s in self._stop if (place := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            end, start = min(found)
            self.stop_string = self._held[start:end]
            ready, self._held = self._held[: end if self._include else start], ""
        else:
            keep = 0 if final else self._possible_stop()
            cut = len(self._held) - keep
            ready, self._held = self._held[:cut], self._held[cut:]
        self.text += ready
        return ready

    def _possible_stop(self) -> int:
        """How many characters at the end of the held text could be the start of a stop string."""
        longest = max((len(s) for s in self._stop), default=0)
        for size in range(min(longest - 1, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0
