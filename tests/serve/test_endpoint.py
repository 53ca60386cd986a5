"""Bodies, hang-ups at every stage, slow readers, pipelining and large prompts, on raw sockets."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import random
import socket
import threading
import time

import pytest

from olmoe.serve import endpoint
from olmoe.serve.state import ServeSettings
from serve.conftest import until

PATH = "/v1/completions"
LONG = {"prompt": "Once upon a time", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


def request_bytes(body, path: str = PATH, **headers) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content


def connect(server) -> socket.socket:
    return socket.create_connection((server.host, server.port), 20)


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


# ---- bodies ----


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "object"),
        (b'"text"', 400, "object"),
        (b"null", 400, "object"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', 400, "JSON"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": ' + b"[" * 100000, 400, "JSON"),
        (b'{"prompt": "a", "x": ' + b"[" * 150 + b"]" * 150 + b', "max_tokens": 1}', 200, None),
    ],
)
def test_malformed_bodies_are_refused(server, content, status, sentence):
    got, body, _ = server.call(PATH, content)
    assert got == status, body
    if sentence:
        assert sentence in body["error"]["message"]
        assert body["error"]["type"] == "invalid_request_error"


def test_only_json_is_accepted(server):
    body = json.dumps({"prompt": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, answer, _ = server.call(PATH, body, headers={"content-type": kind})
        assert (status, answer["error"]["type"]) == (415, "invalid_request_error")
    assert server.call(PATH, body, headers={"content-type": "application/json; charset=utf-8"})[0] == 200


def test_oversized_bodies_are_refused_before_they_are_received(run_server):
    running = run_server(ServeSettings(port=0, max_body_bytes=1000))
    assert running.call(PATH, {"prompt": "a" * 2000})[0] == 413
    with connect(running) as connection:
        connection.sendall(request_bytes(b"").replace(b"content-length: 0", b"content-length: 99999999"))
        assert b" 413 " in read_until(connection, b"}}")
    with connect(running) as connection:  # chunked, without a declared length
        head = request_bytes(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        connection.sendall(head + b"200\r\n" + b"x" * 512 + b"\r\n" + b"200\r\n" + b"x" * 512 + b"\r\n")
        assert b" 413 " in read_until(connection, b"}}")


def test_a_body_that_never_arrives_times_out(run_server):
    running = run_server(ServeSettings(port=0, body_timeout=0.3))
    with connect(running) as connection:
        connection.sendall(request_bytes(LONG)[:-5])
        assert b" 408 " in read_until(connection, b"}}")
    assert running.idle()


def test_shutdown_does_not_wait_for_a_body(run_server):
    """Neither for a stalled body nor for one that trickles in."""
    for drip in (False, True):
        running = run_server(ServeSettings(port=0))
        with connect(running) as connection:
            data = request_bytes(LONG)
            connection.sendall(data[:-20])
            assert until(lambda each=running: each.state.calls)
            running.stop()
            for byte in data[-20:-1] if drip else b"":
                time.sleep(0.05)
                with contextlib.suppress(ConnectionError):
                    connection.sendall(bytes([byte]))
            assert b" 503 " in read_until(connection, b"}}")
        running.thread.join(20)
        assert not running.thread.is_alive()


def test_a_byte_order_mark_is_accepted_and_compression_refused(server):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert server.call(PATH, codecs.BOM_UTF8 + body)[0] == 200
    assert server.call("/v1/responses", codecs.BOM_UTF8 + b'{"input": "a", "max_output_tokens": 1}')[0] == 200
    status, answer, _ = server.call(PATH, gzip.compress(body), headers={"content-encoding": "gzip"})
    assert (status, answer["error"]["message"]) == (
        415,
        "The body must not be compressed ('gzip'); send it as it is.",
    )


# ---- hang-ups ----


def test_hang_ups_at_every_stage_free_everything(server):
    whole = request_bytes({**LONG, "stream": True})
    for stage in (1, 30, len(whole) - 5):  # in the request line, the headers, the body
        with connect(server) as connection:
            connection.sendall(whole[:stage])
    for stream in (True, False):
        for mark in (None, b"HTTP/1.1", b'"text"'):
            if mark == b'"text"' and not stream:
                continue
            with connect(server) as connection:
                connection.sendall(request_bytes({**LONG, "stream": stream, "n": 3}))
                if mark and stream:
                    read_until(connection, mark)
                else:
                    assert until(lambda: server.engine.statistics().running)
            assert server.idle(), (stream, mark)


def test_queued_requests_are_dropped_with_their_clients(run_server):
    running = run_server(max_rows=1)
    with connect(running) as first:
        first.sendall(request_bytes({**LONG, "stream": True}))
        read_until(first, b'"text"')
        others = [connect(running) for _ in range(3)]
        for number, other in enumerate(others):
            other.sendall(request_bytes({**LONG, "stream": bool(number % 2)}))
        assert until(lambda: running.engine.statistics().waiting == 3)
        for other in others:
            other.close()
        assert until(lambda: running.engine.statistics().waiting == 0)
        assert running.engine.statistics().running == 1
    assert running.idle()


def test_a_hang_up_does_not_affect_others(server):
    expected = server.call(PATH, LONG)[1]["choices"][0]["text"]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.call(PATH, LONG)))
    thread.start()
    for _ in range(5):
        with connect(server) as connection:
            connection.sendall(request_bytes({**LONG, "prompt": "The dog", "stream": True}))
            read_until(connection, b'"text"')
    thread.join(60)
    assert answers[0][1]["choices"][0]["text"] == expected
    assert server.idle()


def test_an_unread_stream_ends_and_is_closed(run_server):
    running = run_server(ServeSettings(port=0, stall_timeout=0.5))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((running.host, running.port))
        # More than any buffer between the two holds.
        connection.sendall(request_bytes({**LONG, "stream": True, "n": 16, "logprobs": 20, "routing": True}))
        assert until(lambda: running.engine.statistics().generation_tokens > 1000, 60)
        assert running.idle(60)


def test_a_slow_reader_gets_everything(server):
    whole = server.call(PATH, LONG)[1]["choices"][0]["text"]
    with connect(server) as connection:
        connection.sendall(request_bytes({**LONG, "stream": True}))
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(4096)
            time.sleep(0.002)
    events = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_pipelined_requests_are_answered_in_order(server):
    bodies = [{**LONG, "max_tokens": n, "stream": n == 2} for n in (1, 2, 3)]
    with connect(server) as connection:
        connection.sendall(b"".join(map(request_bytes, bodies)))
        received = b""
        while received.count(b"HTTP/1.1 200") < 3 or not received.endswith(b"}"):
            part = connection.recv(65536)
            assert part
            received += part
    first, second, third = received.split(b"HTTP/1.1 200")[1:]
    assert b'"completion_tokens":1' in first
    assert b"[DONE]" in second
    assert b'"completion_tokens":3' in third


def test_garbage_gets_an_http_answer(server):
    with connect(server) as connection:
        connection.sendall(b"\x16\x03\x01 this is TLS, or nothing\r\n\r\n")
        assert b"400" in connection.recv(4096)
    assert server.call("/health")[0] == 200


# ---- slow work stays off the event loop ----


@pytest.mark.parametrize(("path", "name"), [(PATH, "prompt"), ("/v1/chat/completions", "messages")])
def test_health_answers_while_a_prompt_of_5_mb_is_tokenized(server, path, name):
    words = "once upon a time there was little girl who had big dog and the ball".split()
    text = " ".join(random.Random(0).choices(words, k=14 * 10**5))[: 5 * 2**20]
    assert len(text) == 5 * 2**20
    body = {name: text if name == "prompt" else [{"role": "user", "content": text}]}

    def slowest() -> float:
        """The longest that an answer of /health took meanwhile, in seconds."""
        answers, seconds = [], []
        thread = threading.Thread(target=lambda: answers.append(server.call(path, body)))
        server.call("/health")
        thread.start()
        while thread.is_alive():
            started = time.perf_counter()
            assert server.call("/health")[0] == 200
            seconds.append(time.perf_counter() - started)
            time.sleep(0.005)
        status, answer, _ = answers[0]
        assert (status, answer["error"]["param"]) == (400, name)
        assert "context ends at 512" in answer["error"]["message"]
        return max(seconds)

    # Again if another program had the core: what holds the loop up does so each time.
    assert any(slowest() < 0.1 for _ in range(3))


def test_error_locations_name_only_the_field():
    assert endpoint._location(("stop", "list[str]", 0)) == "stop[0]"
    assert endpoint._location(("messages", 2, "role")) == "messages[2].role"
