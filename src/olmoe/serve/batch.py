"""Runs many requests from a file through the endpoints, without HTTP, with enough in flight to keep the engine busy."""

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
    """The engine cannot continue; requests without an answer stay without one."""


class BatchRun:
    """Answers the requests of a batch, and passes each line of output to `write` as soon as it is ready.

    At most `in_flight` are in progress at a time, so that a batch of any size needs little memory and the engine
    always has work. An error in one request becomes its answer, with OpenAI's error body.
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
        """Run until all are answered or `stop` is set; then requests in progress are aborted and get no answer.

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
        """The status and the body of one answer. Raises `EngineStopped` if that is why there is none."""
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
        assert not isinstance(answer, AsyncGenerator)  # no stream was requested
        return answer

    def _check_model(self, name: object) -> None:
        """A file made for another server names that server's model, which is ignored here; warn once for each name."""
        state = self._state
        if not isinstance(name, str) or name in (state.model_name, *state.aliases) or name in self._other_models:
            return
        if len(self._other_models) < 10:
            self._other_models.add(name)
            written = name[:100] if name[:100].isprintable() else shown(name)  # a terminal must not obey it
            _log.warning("requests name the model %s; %s answers them", written, state.model_name)
