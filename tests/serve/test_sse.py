"""Event streams: comments while idle, errors in mid-stream, and cleanup of everything that runs."""

from __future__ import annotations

import asyncio
import json

import pytest

from olmoe.errors import UserError
from olmoe.serve.errors import ApiError
from olmoe.serve.sse import ANTHROPIC, OPENAI, RESPONSES, send_stream


class Client:
    """Receives what is sent; `pause` stops it from reading."""

    def __init__(self) -> None:
        self.start, self.body, self.ended, self.pause = None, b"", False, None

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        if self.pause is not None:
            await self.pause.wait()
        self.body += message["body"]
        self.ended = not message["more_body"]


def run(chunks, dialect=OPENAI, client=None, keep_alive=10.0, stall=10.0) -> Client:
    client = client or Client()
    asyncio.run(send_stream(client.send, chunks, dialect, keep_alive=keep_alive, stall=stall))
    return client


async def three():
    for number in range(3):
        yield {"type": "part", "text": f"{number}\n☃"}


def test_events_are_sent_and_terminated():
    client = run(three())
    assert dict(client.start["headers"])[b"content-type"] == b"text/event-stream; charset=utf-8"
    events = client.body.decode().split("\n\n")
    assert [json.loads(event[6:])["text"] for event in events[:3]] == ["0\n☃", "1\n☃", "2\n☃"]
    assert events[3:] == ["data: [DONE]", ""]
    assert client.ended


def test_events_may_be_named():
    text = run(three(), RESPONSES).body.decode()
    assert text.count("event: part\ndata: {") == 3
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ApiError(503, "Too much."), "Too much."),
        (UserError("A mistake."), "A mistake."),
        (RuntimeError("secret"), "The server failed; its log says why."),
    ],
)
@pytest.mark.parametrize("dialect", [OPENAI, RESPONSES, ANTHROPIC])
def test_errors_in_mid_stream_are_sent_as_events(error, message, dialect):
    async def breaking():
        yield {"type": "part"}
        raise error

    client = run(breaking(), dialect)
    last = [line for line in client.body.decode().splitlines() if line.startswith("data: {")][-1]
    assert json.loads(last[6:])["error"]["message"] == message
    assert client.ended
    assert ("event: error" in client.body.decode()) == (dialect is not OPENAI)


def test_comments_are_sent_while_idle():
    client = Client()

    def comments() -> int:
        return client.body.count(b": keep-alive\n\n")

    async def slow():
        yield {"text": "a"}
        begun = asyncio.get_running_loop().time()
        while comments() < 3:
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - begun > 0.1  # not one after another: half the time lies between two
        yield {"text": "b"}

    body = run(slow(), client=client, keep_alive=0.1).body
    assert 3 <= comments() <= 12
    assert body.index(b'"a"') < body.index(b": keep-alive") < body.index(b'"b"')


def test_a_client_that_stops_reading_ends_the_stream():
    closed = []

    async def endless():
        try:
            while True:
                yield {"text": "a"}
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    async def go():
        client = Client()
        client.pause = asyncio.Event()
        await asyncio.wait_for(send_stream(client.send, endless(), OPENAI, keep_alive=9, stall=0.2), 5)
        return client

    assert not asyncio.run(go()).ended
    assert closed == [True]


def test_a_cancelled_stream_closes_its_source():
    closed = []

    async def endless():
        try:
            yield {"text": "a"}
            await asyncio.sleep(100)
        finally:
            closed.append(True)

    async def go():
        client = Client()
        task = asyncio.ensure_future(send_stream(client.send, endless(), OPENAI, keep_alive=9, stall=9))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert closed == [True]
