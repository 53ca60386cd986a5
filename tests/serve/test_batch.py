"""Batches through the endpoints: concurrency, errors as answers, and stopping without losing anything."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from pydantic import BaseModel

from olmoe.errors import UserError
from olmoe.serve.app import ENDPOINTS
from olmoe.serve.batch import BatchRun, EngineStopped
from olmoe.serve.batch_file import BatchLine
from olmoe.serve.endpoint import Endpoint
from olmoe.serve.errors import invalid, overloaded

URL = "/v1/completions"


class Body(BaseModel):
    prompt: str
    model: str | None = None


class Fake:
    """An endpoint that answers when told to and records its requests."""

    def __init__(self, action=None) -> None:
        self.running = self.most = 0
        self.bodies, self.cancelled = [], []
        self.action = action
        self.state = SimpleNamespace(
            model_name="served", aliases=("other",), thread=SimpleNamespace(failed=None), settings=None
        )
        self.endpoints = {URL: Endpoint(URL, Body, self.create, "")}

    async def create(self, state, body, context):
        self.running += 1
        self.most = max(self.most, self.running)
        self.bodies.append(body)
        try:
            await asyncio.sleep(0)
            if self.action is not None:
                await self.action(body.prompt)
        except asyncio.CancelledError:
            self.cancelled.append(body.prompt)
            raise
        finally:
            self.running -= 1
        return {"text": body.prompt}

    def run(self, lines, *, in_flight=4, stop=None, on_write=None) -> tuple[BatchRun, list[dict]]:
        written: list[dict] = []

        async def everything() -> BatchRun:
            event = asyncio.Event() if stop is None else stop()
            work = BatchRun(self.state, self.endpoints, on_write or written.append, in_flight=in_flight)
            self.event = event
            await work.run(lines, event)
            return work

        return asyncio.run(everything()), written


def line(name: str, url: str = URL, **body) -> BatchLine:
    return BatchLine(1, name, url, {"prompt": name} | body)


def test_all_are_answered_with_a_bounded_number_in_flight():
    fake, taken = Fake(), []

    def lines():
        for i in range(50):
            taken.append(i - len(written))
            yield line(str(i))

    written: list[dict] = []
    work, _ = fake.run(lines(), on_write=written.append)
    assert sorted(int(each["custom_id"]) for each in written) == list(range(50))
    assert all(each["response"]["body"] == {"text": each["custom_id"]} for each in written)
    assert (work.succeeded, work.failed, fake.most) == (50, 0, 4)
    assert max(taken) < 9  # lines are read as they are needed


def test_an_invalid_request_is_answered_with_its_error(caplog):
    async def act(prompt):
        if prompt == "api":
            raise invalid("temperature must be at least 0, not -1.", "temperature")
        if prompt == "user":
            raise UserError("top_p must be at most 1.")
        if prompt == "full":
            raise overloaded("512 requests wait already.")
        if prompt == "bug":
            raise ZeroDivisionError

    names = ["api", "good", "user", "bug", "full"]
    lines = [*map(line, names), line("url", "/v1/responses"), line("stream", stream=True), line("body", prompt=3)]
    work, written = Fake(act).run(lines)
    found = {each["custom_id"]: each["response"] for each in written}
    statuses = {name: answer["status_code"] for name, answer in found.items()}
    assert statuses == {
        "api": 400, "good": 200, "user": 400, "bug": 500, "full": 503, "url": 400, "stream": 400, "body": 400,
    }  # fmt: skip
    assert (work.succeeded, work.failed) == (1, 7)
    error = found["api"]["body"]["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "temperature")
    assert found["user"]["body"]["error"]["param"] == "top_p"
    assert found["stream"]["body"]["error"]["param"] == "stream"
    assert found["body"]["body"]["error"]["param"] == "prompt"
    assert "'bug' failed" in caplog.text
    assert all(each["error"] is None for each in written)


def test_stopping_aborts_running_requests_and_writes_no_answer_for_them():
    async def act(prompt):
        if prompt == "6":
            fake.event.set()
        if int(prompt) >= 3:
            await asyncio.sleep(60)

    fake = Fake(act)
    work, written = fake.run((line(str(i)) for i in range(100)), in_flight=4)
    assert sorted(each["custom_id"] for each in written) == ["0", "1", "2"]
    assert sorted(fake.cancelled) == ["3", "4", "5", "6"]
    assert (work.succeeded, fake.running) == (3, 0)


def test_an_engine_that_stops_ends_the_run():
    async def act(prompt):
        if prompt == "2":
            fake.state.thread.failed = RuntimeError("out of numbers")
            raise overloaded("The engine has stopped.")
        if prompt == "3":
            await asyncio.sleep(60)

    fake = Fake(act)
    written: list[dict] = []
    with pytest.raises(EngineStopped, match=r"^The engine stopped: out of numbers\.$"):
        fake.run(map(line, "0123"), on_write=written.append)
    assert [each["custom_id"] for each in written] == ["0", "1"]
    assert fake.cancelled == ["3"]


def test_a_full_disk_ends_the_run():
    def write(_):
        raise OSError(28, "No space left on device")

    fake = Fake()
    with pytest.raises(OSError, match="No space left"):
        fake.run(map(line, "0123"), on_write=write)
    assert fake.running == 0


def test_a_file_made_for_another_model_is_answered_with_one_warning(caplog):
    caplog.set_level(logging.WARNING, "olmoe")
    fake = Fake()
    fake.run([line("a", model="gpt-x"), line("b", model="gpt-x"), line("c", model="served"), line("d", model="other")])
    assert [body.model for body in fake.bodies] == ["served"] * 4
    assert [r.getMessage() for r in caplog.records] == ["requests name the model gpt-x; served answers them"]


# ---- over the engine ----


def test_the_engine_answers_the_same_as_over_http(server):
    """The same bodies, concurrently and mixed, one of them invalid."""
    bodies = {
        "text": (URL, {"prompt": "Once upon a time", "max_tokens": 8}),
        "ids": (URL, {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 2}),
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}),
        "long": (URL, {"prompt": [5] * 600, "max_tokens": 4}),
    }
    bodies = {name: (url, body | {"temperature": 0}) for name, (url, body) in bodies.items()}
    expected = {name: server.call(url, body)[:2] for name, (url, body) in bodies.items()}
    written: list[dict] = []

    async def everything() -> None:
        endpoints = {each.path: each for each in ENDPOINTS}
        work = BatchRun(server.state, endpoints, written.append, in_flight=3)
        await work.run([BatchLine(1, name, url, body) for name, (url, body) in bodies.items()], asyncio.Event())

    # The state belongs to its server's event loop.
    asyncio.run_coroutine_threadsafe(everything(), server.server.loop).result(60)
    for each in written:
        status, body = expected[each["custom_id"]]
        answer = json.loads(json.dumps(each["response"]["body"]))
        assert each["response"]["status_code"] == status
        for field in ("choices", "error"):
            assert answer.get(field) == body.get(field)
    assert {each["custom_id"] for each in written} == set(bodies)
    assert expected["long"][0] == 400
