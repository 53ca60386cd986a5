"""From the engine's thread to the event loop: one wake-up per step, and a mailbox for each waiting call.

The engine delivers the deltas of all requests of a step at once. They are passed to the loop in one call and sorted
into the mailboxes of the waiting calls. If a reader lags behind, what waits for it is merged, request by request, so
that a slow client holds one delta for each of its requests and never a queue of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from olmoe.engine.request import Delta, Request

_log = logging.getLogger("olmoe")


def merged(first: Delta, second: Delta) -> Delta:
    """Two deltas of one request, as if a single step had brought both."""
    return Delta(
        first.request,
        first.text + second.text,
        [*first.token_ids, *second.token_ids],
        [*first.logprobs, *second.logprobs] if second.logprobs else first.logprobs,
        [*first.routing, *second.routing] if second.routing else first.routing,
        second.finish_reason,
        second.error,
    )


class Mailbox:
    """What has arrived for the requests of one call but has not been read. Belongs to the event loop."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.index = {request: index for index, request in enumerate(requests)}
        self.unfinished = set(requests)  # whose last delta has not been read
        self._waiting: dict[Request, Delta] = {}
        self._wake = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Add a delta, merged with what is there."""
        earlier = self._waiting.get(delta.request)
        self._waiting[delta.request] = delta if earlier is None else merged(earlier, delta)
        self._wake.set()

    async def take(self) -> list[tuple[int, Delta]]:
        """Everything that has arrived; waits until there is something."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        taken, self._waiting = self._waiting, {}
        for request, delta in taken.items():
            if delta.finish_reason is not None:
                self.unfinished.discard(request)
        return [(self.index[request], delta) for request, delta in taken.items()]


class Hub:
    """All mailboxes. `deliver` is called on the engine's thread, everything else on the loop's.

    `observe` is called, on the loop, with what arrives in each step (for metrics).
    """

    def __init__(self, observe: Callable[[list[Delta]], None] | None = None) -> None:
        self._boxes: dict[Request, Mailbox] = {}
        self._observe = observe
        self._loop: asyncio.AbstractEventLoop | None = None

    def deliver(self, deltas: list[Delta]) -> None:
        """Called by the engine's thread after each step."""
        if deltas and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, deltas)

    def open(self, requests: Sequence[Request]) -> Mailbox:
        """A mailbox for requests that are about to be submitted. Readers all run on one event loop, this one."""
        self._loop = asyncio.get_running_loop()
        box = Mailbox(requests)
        for request in requests:
            self._boxes[request] = box
        return box

    def close(self, box: Mailbox) -> list[Request]:
        """Remove a mailbox; returns its unfinished requests, which nobody waits for any more."""
        return [request for request in box.index if self._boxes.pop(request, None) and request in box.unfinished]

    @property
    def requests(self) -> list[Request]:
        """All requests that somebody waits for."""
        return list(self._boxes)

    def queued(self) -> tuple[int, int]:
        """How many of them the engine has not started, and how many tokens their prompts have."""
        waiting = [len(r.prompt_ids) for r in self._boxes if not r.times.scheduled and r.finish_reason is None]
        return len(waiting), sum(waiting)

    def _sort(self, deltas: list[Delta]) -> None:
        try:
            if self._observe is not None:
                self._observe(deltas)
        except Exception:  # a metric must not make anyone wait for ever
            _log.exception("metrics have failed")
        for delta in deltas:
            box = self._boxes.get(delta.request)
            if box is not None:
                box.put(delta)
