"""The engine thread: every submitted request gets a final delta, whatever happens."""

from __future__ import annotations

import threading
import time
from collections import defaultdict

import pytest

from conftest import make_model
from olmoe.engine.engine import Engine
from olmoe.engine.request import Delta, Request
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.thread import EngineThread
from olmoe.runner import make_runner


class Readers:
    """Collects the deltas of each request, and waits for the final ones."""

    def __init__(self) -> None:
        self.news: dict[Request, list[Delta]] = defaultdict(list)
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, news: list[Delta]) -> None:
        with self._changed:
            self.threads.add(threading.current_thread().name)
            for delta in news:
                self.news[delta.request].append(delta)
            self._changed.notify_all()

    def wait(self, *requests: Request, pieces: int = 0) -> None:
        def done() -> bool:
            return all(
                self.news[each] and (self.news[each][-1].finish_reason or 0 < pieces <= len(self.news[each]))
                for each in requests
            )

        with self._changed:
            assert self._changed.wait_for(done, 60)


@pytest.fixture
def engine(tokenizer):
    runner = make_runner(make_model(num_key_value_heads=2, max_position_embeddings=512))
    return Engine(runner, tokenizer, context_length=512, cache_bytes=64 * 64 * runner.position_bytes)


@pytest.fixture
def readers():
    return Readers()


@pytest.fixture
def thread(engine, readers):
    thread = EngineThread(engine, readers)
    thread.start()
    yield thread
    thread.close()


def long(engine: Engine) -> Request:
    return engine.request([9] * 20, SamplingParams(max_new_tokens=400, ignore_eos=True))


def test_requests_may_come_from_many_threads(engine, thread, readers):
    params = [SamplingParams(max_new_tokens=1 + i, ignore_eos=True) for i in range(20)]
    requests = [engine.request([5 + i] * (1 + i), each) for i, each in enumerate(params)]
    sources = [threading.Thread(target=thread.submit, args=([request],)) for request in requests]
    for source in sources:
        source.start()
    readers.wait(*requests)
    for request, each in zip(requests, params, strict=True):
        assert request.finish_reason == "length"
        assert len(request.token_ids) == each.max_new_tokens
        assert "".join(delta.text for delta in readers.news[request]) == request.text
        assert 0 < request.times.arrived <= request.times.scheduled <= request.times.first_token
        assert request.times.first_token <= request.times.finished
    assert readers.threads == {"olmoe-engine"}
    assert engine.statistics().blocks_used == 0


def test_an_abort_ends_only_its_request(engine, thread, readers):
    doomed, other = long(engine), long(engine)
    thread.submit([doomed, other])
    readers.wait(doomed, pieces=3)
    thread.abort([doomed])
    readers.wait(doomed, other)
    assert (doomed.finish_reason, other.finish_reason) == ("cancelled", "length")
    thread.abort([doomed])  # it finished long ago
    assert len([d for d in readers.news[doomed] if d.finish_reason]) == 1


def test_close_cancels_remaining_requests(engine, thread, readers):
    running = long(engine)
    thread.submit([running])
    readers.wait(running, pieces=1)
    waiting = long(engine)
    thread.submit([waiting])
    thread.close()
    readers.wait(running, waiting)
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")


def test_an_exception_in_the_runner_fails_all_requests(engine, thread, readers, monkeypatch, caplog):
    first, second = long(engine), long(engine)
    thread.submit([first])
    readers.wait(first, pieces=2)

    def broken(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(type(engine.runner), "forward", broken)
    thread.submit([second])
    readers.wait(first, second)
    later = long(engine)
    thread.submit([later])
    readers.wait(later)
    for request in (first, second, later):
        assert request.finish_reason == "error"
        assert readers.news[request][-1].error == (
            "The engine has failed (RuntimeError: out of order); restart the server."
        )
    assert isinstance(thread.failed, RuntimeError)
    assert "the engine has failed" in caplog.text


def test_an_exception_in_a_reader_does_not_stop_the_engine(engine, caplog):
    readers, calls = Readers(), []

    def deliver(news: list[Delta]) -> None:
        readers(news)
        calls.append(news)
        raise ValueError("reader")

    thread = EngineThread(engine, deliver)
    thread.start()
    try:
        request = long(engine)
        thread.submit([request])
        readers.wait(request)
        assert request.finish_reason == "length"
        assert "could not be delivered" in caplog.text
    finally:
        thread.close()


def test_the_engine_thread_sleeps_without_work(engine, thread, readers):
    request = long(engine)
    thread.submit([request])
    readers.wait(request)
    time.sleep(0.1)
    steps, used = engine.statistics().steps, time.process_time()
    time.sleep(0.3)
    assert engine.statistics().steps == steps
    assert time.process_time() - used < 0.2


class _Startless:
    def start(self):
        raise ValueError("no start")


def test_a_request_that_cannot_start_fails_alone(engine, thread, readers):
    broken = engine.request([9], SamplingParams(grammar=_Startless()))
    other = long(engine)
    thread.submit([broken, other])
    readers.wait(broken, other)
    assert readers.news[broken][-1].error == broken.error == "The text cannot be started (no start)."
    assert (other.finish_reason, thread.failed) == ("length", None)


def test_a_request_submitted_twice_runs_once(engine, thread, readers):
    request = long(engine)
    thread.submit([request, request])
    readers.wait(request, pieces=2)
    thread.submit([request])
    readers.wait(request)
    thread.submit([request])
    last = long(engine)
    thread.submit([last])
    readers.wait(last)
    assert (len(request.token_ids), thread.failed) == (400, None)
    assert len([d for d in readers.news[request] if d.finish_reason]) == 1


def test_requests_submitted_after_the_end_are_cancelled(engine, thread, readers):
    thread.close()
    request = long(engine)
    thread.submit([request])
    readers.wait(request)
    thread.abort([request])
    assert [d.finish_reason for d in readers.news[request]] == ["cancelled"]
