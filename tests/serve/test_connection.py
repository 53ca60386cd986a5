"""Request heads over real sockets: their size, their speed, and requests to upgrade."""

from __future__ import annotations

import re
import socket
import time

import pytest

from olmoe.serve.state import ServeSettings

BODY = b'{"prompt":"a","max_tokens":2}'
UPGRADE = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Type: application/json\r\n"
)


def connect(server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=10)


def statuses(client: socket.socket, count: int) -> list[int]:
    """The statuses of this many answers, or of those that arrived before the connection closed."""
    got = b""
    while len(re.findall(rb"HTTP/1.1 \d+", got)) < count:
        part = client.recv(65536)
        if not part:
            break
        got += part
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", got)]


@pytest.mark.parametrize(
    "rest",
    [b"Content-Length: 29\r\n\r\n" + BODY, b"Transfer-Encoding: chunked\r\n\r\n1d\r\n" + BODY + b"\r\n0\r\n\r\n"],
)
@pytest.mark.parametrize("size", [7, 150, 10**6])
def test_requests_to_upgrade_are_answered_over_http_1_1(server, rest, size):
    """As Java's HttpClient and `curl --http2` send them, on a reused connection, in parts of any size."""
    with connect(server) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            data = UPGRADE + rest
            for start in range(0, len(data), size):
                client.sendall(data[start : start + size])
                time.sleep(0.002)
            assert statuses(client, 1) == [200]
        client.sendall((UPGRADE + rest) * 2 + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")  # pipelined
        assert statuses(client, 3) == [200, 200, 200]


def test_upgrades_with_close_are_ignored_and_connect_is_refused(server):
    for name in (b"websocket", b"h2c"):
        with connect(server) as client:
            head = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close, Upgrade\r\nUpgrade: " + name + b"\r\n\r\n"
            client.sendall(head)
            assert statuses(client, 2) == [200]  # and the end
    with connect(server) as client:
        client.sendall(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert statuses(client, 2) == [400]


def test_an_endless_head_is_not_buffered(server):
    for begin in (b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET /health HTTP/1.1\r\n"):
        with connect(server) as client:
            line = b"X: " + b"a" * 1021 + b"\r\n" if begin.endswith(b"\n") else b"a" * 1024
            client.sendall(begin)
            sent = 0
            try:
                while sent < 4096:
                    client.sendall(line)
                    sent += 1
                    time.sleep(0.0005)
            except OSError:
                pass
            assert sent < 4096
    with connect(server) as client:  # a large head that does end
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nCookie: " + b"a" * 30000 + b"\r\n\r\n")
        assert statuses(client, 1) == [200]


def test_a_head_that_never_arrives_times_out(run_server):
    server = run_server(ServeSettings(port=0, body_timeout=0.4))
    with connect(server) as drip, connect(server) as half, connect(server) as second, connect(server) as good:
        half.sendall(b"POST /v1/compl")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while b"}" not in answer:
            answer += second.recv(1000)
        second.sendall(b"GET /hea")
        ended = []
        for _ in range(20):
            time.sleep(0.1)
            try:
                drip.sendall(b"GET / HTTP/1.1\r\nX" if not ended else b"x")
                ended.append(1)
            except OSError:
                break
        assert len(ended) < 20
        assert half.recv(100) == second.recv(100) == b""
        good.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert statuses(good, 1) == [200]


def test_a_slow_second_head_does_not_cut_off_the_first_answer(run_server):
    server = run_server(ServeSettings(port=0, body_timeout=0.25))  # the answer takes longer
    body = b'{"prompt":"a","max_tokens":500,"ignore_eos":true,"n":16,"stream":true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with connect(server) as client:
        client.sendall(head % len(body) + body + b"GET /hea")
        got = b""
        while b"[DONE]" not in got:
            part = client.recv(65536)
            assert part, got[-200:]
            got += part


def test_answers_to_http_1_0_are_not_chunked(server):
    """Such clients, including some proxies, would read chunk lengths as text."""
    body = b'{"prompt":"Once upon a time","max_tokens":9,"temperature":0,"stream":true}'
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nConnection: keep-alive\r\n"
    with connect(server) as client:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        got = b""
        while part := client.recv(65536):  # closing the connection ends the answer
            got += part
    told, _, text = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in told.lower()
    assert b"\r" not in text
    assert text.startswith(b"data: {")
    assert text.endswith(b"data: [DONE]\n\n")
    with connect(server) as client:  # an answer of known length
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        got = b""
        while part := client.recv(65536):
            got += part
    assert got.endswith(b'\r\n\r\n{"status":"ok"}')
