"""A real server on a free port with the shipped olmoe-tiny, in a thread of the test process."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from olmoe.engine.engine import Engine
from olmoe.engine.llm import LLM
from olmoe.serve.server import Server, bind, url_of
from olmoe.serve.state import ServerState, ServeSettings, make_state


@dataclass
class Running:
    """A running server: its address and its parts."""

    url: str  # without a slash at the end
    host: str
    port: int
    state: ServerState
    server: Server
    thread: threading.Thread
    llm: LLM

    @property
    def engine(self) -> Engine:
        return self.state.engine

    def stop(self) -> None:
        """Stop as on a signal."""
        self.server.loop.call_soon_threadsafe(self.server.stop)

    def call(self, path: str, body=None, *, headers=None, method: str | None = None, timeout: float = 60):
        """(status, parsed JSON or text, headers) of a call; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})} if body is not None else headers or {}
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if "json" in kind else content.decode(), answer.headers

    def events(self, path: str, body) -> list:
        """The events of a stream, "[DONE]" included."""
        status, text, headers = self.call(path, {**body, "stream": True})
        assert status == 200, text
        assert headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def idle(self, seconds: float = 10) -> bool:
        """Whether the engine soon has nothing running or waiting and every block is free."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = self.engine.statistics()
            if not (now.running or now.waiting or now.blocks_used or self.state.calls):
                return True
            time.sleep(0.02)
        return False


def until(condition, seconds: float = 10) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="session")
def tiny_llm() -> LLM:
    return LLM()


def start(llm: LLM, settings: ServeSettings | None = None, **options) -> Running:
    """Run a server; `options` are the engine's."""
    settings = settings or ServeSettings(port=0)
    listener = bind(settings.host, settings.port)
    options = {"cache_bytes": 2**27, "context_length": llm.context_length, "backend": llm.backend, **options}
    engine = Engine(llm.runner, llm.tokenizer, **options)
    state = make_state(
        engine,
        llm.tokenizer,
        model_name="olmoe-tiny",
        config=llm.config,
        context_length=options["context_length"],
        settings=settings,
    )
    host, port = listener.getsockname()[:2]
    server = Server(state, listener)
    thread = threading.Thread(target=server.run, kwargs={"signals": False}, daemon=True)
    thread.start()
    running = Running(url_of(listener, settings), host, port, state, server, thread, llm)
    assert until(lambda: hasattr(server, "loop"))
    return running


@pytest.fixture
def run_server(tiny_llm):
    """Start servers with their own settings or engine options; they stop with the test."""
    running = []

    def run(settings: ServeSettings | None = None, **options) -> Running:
        running.append(start(tiny_llm, settings, **options))
        return running[-1]

    yield run
    for each in running:
        end(each)


@pytest.fixture(scope="session")
def server(tiny_llm) -> Running:
    """The server that most tests share: no keys, default limits."""
    running = start(tiny_llm)
    yield running
    end(running)


def end(running: Running) -> None:
    """Stop at once, whatever is running."""
    if running.thread.is_alive():
        running.stop()
        running.stop()
        running.thread.join(20)
        assert not running.thread.is_alive()
