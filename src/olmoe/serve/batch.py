"""Many requests of a file through the endpoints, without HTTP: all in flight that the engine can use at once."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any

from olmoe.errors import UserError, shown
from olmoe.serve.batch_file import BatchLine, result
from olmoe.serve.endpoint import Endpoint
from olmoe.serve.errors import ApiError, from_user_error, invalid
from olmoe.serve.state import CallContext, ServerState

_log = logging.getLogger("olmoe")


class EngineStopped(UserError):
    """The engine cannot go on; what has no answer yet gets none."""


class BatchRun:
    """Answers the requests of a batch, and hands each line of the output to `write` as soon as it is there.

    At most `in_flight` are begun and unfinished at a time, so that a batch of any size needs little memory and the
    engine always has work. What is wrong with one request becomes its answer, with OpenAI's error body.
    """

    def __init__(
        self,
        state: ServerState,
        endpoints: Mapping[str, Endpoint],
        write: Callable[[dict[str, Any]], None],
        *,
        in_flight: int,
    ) -> None:
        self.succeeded = self.failed = 0
        self._state, self._endpoints, self._write, self._in_flight = state, endpoints, write, in_flight
        self._other_models: set[str] = set()

    async def run(self, lines: Iterable[BatchLine], stop: asyncio.Event) -> None:
        """Until all are answered or `stop` is set; then what is in progress is aborted, and has no answer.

        Raises `EngineStopped`, and whatever `write` raises.
        """
        waiting = iter(lines)
        tasks: set[asyncio.Task[None]] = set()
        stopped = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                while len(tasks) < self._in_flight and (line := next(waiting, None)) is not None:
                    tasks.add(asyncio.create_task(self._one(line)))
                if not tasks:
                    return
                done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & tasks:
                    tasks.discard(task)
                    task.result()
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)

    async def _one(self, line: BatchLine) -> None:
        status, body = await self.answer(line)
        self._write(result(line.custom_id, status, body))
        if status == 200:
            self.succeeded += 1
        else:
            self.failed += 1

    async def answer(self, line: BatchLine) -> tuple[int, dict[str, Any]]:
        """The status and the body of one answer. Raises `EngineStopped` where that is why there is none."""
        try:
            return 200, await self._create(line)
        except ApiError as error:
            found = error
        except UserError as error:
            found = from_user_error(error)
        except Exception:
            _log.exception("the request %r failed", line.custom_id)
            found = ApiError(500, "The request could not be answered because of an error of the program; see its log.")
        if self._state.thread.failed is not None:
            raise EngineStopped(f"The engine stopped: {str(self._state.thread.failed).rstrip('.')}.")
        return found.status, found.body()

    async def _create(self, line: BatchLine) -> dict[str, Any]:
        endpoint = self._endpoints.get(line.url)
        if endpoint is None:
            raise invalid(f"{line.url} is not supported here; use {', '.join(self._endpoints)}.", "url")
        body = dict(line.body)
        if body.get("stream"):
            raise invalid("stream is not supported in a batch; leave it out.", "stream")
        self._check_model(body.pop("model", None))
        parsed = endpoint.parse(json.dumps(body | {"model": self._state.model_name}).encode("utf-8", "replace"))
        answer = await endpoint.create(self._state, parsed, CallContext())
        assert not isinstance(answer, AsyncGenerator)  # it was not asked to stream
        return answer

    def _check_model(self, name: object) -> None:
        """A file made for another server names its model, which says nothing here; that is said once for each."""
        state = self._state
        if not isinstance(name, str) or name in (state.model_name, *state.aliases) or name in self._other_models:
            return
        if len(self._other_models) < 10:
            self._other_models.add(name)
            written = name[:100] if name[:100].isprintable() else shown(name)  # a terminal must not obey it
            _log.warning("requests name the model %s; %s answers them", written, state.model_name)
