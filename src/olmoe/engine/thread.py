"""`EngineThread`: one thread around an `Engine`, for servers, where requests arrive from other threads at any time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from olmoe.engine.engine import Engine
from olmoe.engine.request import Delta, Request
from olmoe.errors import UserError

_log = logging.getLogger("olmoe")
# Requests that arrive together are cheaper together: one that finds the engine idle waits for others, for this
# fraction of a step's time, and never longer than these seconds.
_GATHERING, _LONGEST_GATHERING = 0.04, 0.005


class EngineThread:
    """Runs an engine as long as it has work, and sleeps otherwise.

    `deliver` is called on the thread, once per step, with what is new for all requests. Every submitted request gets a
    last delta: if the engine fails, one with the finish reason "error", and `failed` says why.
    """

    def __init__(self, engine: Engine, deliver: Callable[[list[Delta]], None]) -> None:
        self.engine, self._deliver = engine, deliver
        self.failed: BaseException | None = None
        self._inbox: deque[tuple[bool, Request]] = deque()  # (whether it is new, else to be aborted, request)
        self._wake = threading.Condition()
        self._closing = False
        self._ended = False  # nobody will read the inbox any more
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="olmoe-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; requests submitted earlier are taken up now."""
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests for the next step. Returns at once; may be called from any thread.

        After `close` they are cancelled, and `deliver` is called on the calling thread.
        """
        self._put(True, requests)

    def abort(self, requests: Sequence[Request]) -> None:
        """Give up requests before the next step. May be called from any thread, even for those that have finished."""
        self._put(False, requests)

    def close(self) -> None:
        """Abort everything and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _put(self, new: bool, requests: Sequence[Request]) -> None:
        now = time.perf_counter()
        with self._wake:
            for request in requests:
                if new:
                    request.times.arrived = now
                self._inbox.append((new, request))
            self._wake.notify()
            late = list(self._inbox) if self._ended else []
        if late:
            self._inbox.clear()
            self._deliver_safely(self._cancelled(late))

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # torch keeps this number per thread
        while True:
            with self._wake:
                if not self._has_work():
                    self._wake.wait_for(lambda: self._inbox or self._closing)
                    step = self.engine.statistics().step_seconds
                    self._wake.wait_for(lambda: self._closing, min(_GATHERING * step, _LONGEST_GATHERING))
                orders, closing = list(self._inbox), self._closing
                self._inbox.clear()
                self._ended = closing
            if closing:
                break
            self._deliver_safely(self._turn(orders))
        self._deliver_safely(self._cancelled(orders))

    def _has_work(self) -> bool:
        return bool(self._inbox or self._closing or (self.failed is None and self.engine.has_work))

    def _turn(self, orders: list[tuple[bool, Request]]) -> list[Delta]:
        """Carry out what was submitted, then a step -> what is new."""
        refused: list[Delta] = []
        if self.failed is None:
            try:
                for new, request in orders:
                    if new:
                        refused += self._add(request)
                    else:
                        self.engine.abort(request)
                return refused + self.engine.step()
            except Exception as error:  # whatever it is, no client must wait for ever
                self.failed = error
                _log.exception("the engine has failed; restart it")
        news = refused + self.engine.unreported()
        requests = dict.fromkeys([*self.engine.requests(), *(request for new, request in orders if new)])
        return news + [self._failure(request) for request in requests if request.finish_reason is None]

    def _add(self, request: Request) -> list[Delta]:
        """Take up a request -> its end, if that fails: the others continue."""
        if request in self.engine or request.finish_reason is not None:  # submitted twice: it has its readers
            return []
        try:
            self.engine.add(request)
        except Exception as error:
            _log.exception("a request could not be started")
            request.finish_reason = "error"
            request.error = str(error) if isinstance(error, UserError) else f"The text cannot be started ({error})."
            return [Delta(request, finish_reason="error", error=request.error)]
        return []

    def _failure(self, request: Request) -> Delta:
        request.finish_reason = "error"
        request.error = f"The engine has failed ({type(self.failed).__name__}: {self.failed}); restart the server."
        return Delta(request, finish_reason="error", error=request.error)

    def _cancelled(self, orders: list[tuple[bool, Request]]) -> list[Delta]:
        open_ = dict.fromkeys([*self.engine.requests(), *(request for new, request in orders if new)])
        news = []
        for request in open_:
            if request.finish_reason is None:
                request.finish_reason = "cancelled"
                news.append(Delta(request, finish_reason="cancelled"))
        return news

    def _deliver_safely(self, news: list[Delta]) -> None:
        if news:
            try:
                self._deliver(news)
            except Exception:  # one reader's error must not stop the engine
                _log.exception("the results of a step could not be delivered")
