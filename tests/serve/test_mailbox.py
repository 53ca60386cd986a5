"""Mailboxes without an engine: deltas that arrive while nobody reads are merged."""

from __future__ import annotations

import asyncio
import threading

from olmoe import SamplingParams
from olmoe.engine.request import Delta, Request
from olmoe.serve.mailbox import Hub, merged


def make() -> Request:
    return Request([1, 2], SamplingParams(), 9)


def test_merged_deltas_form_one_delta():
    request = make()
    first, second = Delta(request, "a", [1]), Delta(request, "b", [2], finish_reason="length")
    assert merged(first, second) == Delta(request, "ab", [1, 2], finish_reason="length")
    assert first.token_ids == [1]
    assert Delta(request).token_ids == []


def test_a_slow_reader_gets_one_delta_per_request():
    async def run():
        hub, requests = Hub(), [make(), make()]
        box = hub.open(requests)
        for step in range(5):
            hub.deliver([Delta(request, str(step), [step]) for request in requests])
        await asyncio.sleep(0)
        assert [(index, delta.text) for index, delta in await box.take()] == [(0, "01234"), (1, "01234")]
        assert box.unfinished == set(requests)
        hub.deliver([Delta(requests[1], "!", finish_reason="stop")])
        assert [(index, delta.text) for index, delta in await box.take()] == [(1, "!")]
        assert hub.close(box) == [requests[0]]
        assert hub.requests == []
        hub.deliver([Delta(requests[0], "nobody reads this")])
        await asyncio.sleep(0)

    asyncio.run(run())


def test_a_reader_is_woken_from_another_thread():
    async def run():
        hub, request = Hub(), make()
        box = hub.open([request])
        threading.Timer(0.05, hub.deliver, [[Delta(request, "a", [1], finish_reason="eos")]]).start()
        ((index, delta),) = await asyncio.wait_for(box.take(), 5)
        assert (index, delta.text, box.unfinished) == (0, "a", set())
        assert hub.close(box) == []

    asyncio.run(run())


def test_observers_see_every_step_even_without_readers():
    async def run():
        seen = []
        hub, request = Hub(seen.append), make()
        hub.close(hub.open([request]))
        hub.deliver([Delta(request, "a")])
        await asyncio.sleep(0)
        assert [[delta.text for delta in step] for step in seen] == [["a"]]

    asyncio.run(run())


def test_the_queue_holds_requests_that_have_not_started():
    async def run():
        hub, requests = Hub(), [make(), make(), make()]
        hub.open(requests)
        requests[0].times.scheduled = 1.0
        requests[1].finish_reason = "cancelled"
        assert hub.queued() == (1, 2)

    asyncio.run(run())


def test_a_failing_observer_does_not_affect_readers(caplog):
    async def run():
        def observe(_):
            raise ValueError("no such number")

        hub, request = Hub(observe), make()
        box = hub.open([request])
        hub.deliver([Delta(request, "a", [1], finish_reason="eos")])
        ((_, delta),) = await asyncio.wait_for(box.take(), 5)
        assert delta.text == "a"

    asyncio.run(run())
    assert "metrics have failed" in caplog.text
