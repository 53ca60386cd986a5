"""Sockets, TLS files, draining and the second signal, on a real server."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from olmoe.errors import UserError
from olmoe.serve.server import allow_connections, bind, check_tls
from olmoe.serve.state import ServeSettings
from serve.conftest import until

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def test_a_port_in_use_is_reported_in_one_sentence():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 is in use; choose another with --port"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("127.0.0.1", 99999, "between 0 and 65535"),
        ("nowhere.invalid", 8000, "The host 'nowhere.invalid' is unknown"),
        ("198.51.100.7", 0, "not an address of this machine"),
    ],
)
def test_unavailable_addresses_are_refused(host, port, sentence):
    with pytest.raises(UserError, match=sentence):
        bind(host, port)


def test_certificates_are_checked_before_starting(tmp_path):
    path = tmp_path / "cert.pem"
    path.write_text("nothing")
    with pytest.raises(UserError, match="cannot be used"):
        check_tls(ServeSettings(ssl_certfile=path))
    with pytest.raises(UserError, match="--ssl-keyfile needs --ssl-certfile"):
        check_tls(ServeSettings(ssl_keyfile=path))


def test_an_encrypted_key_is_refused_without_a_password_prompt(tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:secret", "-days", "2", "-subj", "/CN=a",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="is encrypted; decrypt it, with openssl pkey -in "):
        check_tls(ServeSettings(ssl_certfile=certificate, ssl_keyfile=key))


def test_the_limit_on_open_files_is_raised_as_far_as_allowed():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        allow_connections(most=300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (300 if hard == -1 else min(hard, 300))
        allow_connections(most=280)  # never fewer
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300 or hard < 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_draining_lets_requests_finish_and_refuses_new_ones(run_server):
    running = run_server()
    answers = []
    first = threading.Thread(target=lambda: answers.append(running.call("/v1/completions", LONG)))
    first.start()
    assert until(lambda: running.engine.statistics().running == 1)
    running.stop()
    assert until(lambda: running.state.draining)
    status, body, headers = running.call("/v1/completions", LONG)
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "server_overloaded", "5")
    assert headers["connection"] == "close"
    assert running.call("/ready")[0] == 503
    assert running.call("/health")[0] == 200
    first.join(60)
    ((status, body, _),) = answers
    assert (status, body["usage"]["completion_tokens"]) == (200, 400)
    running.thread.join(10)
    assert not running.thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((running.host, running.port), 1)


def test_a_second_stop_aborts_running_requests_and_says_so(run_server):
    running = run_server(max_rows=1)
    texts, answers = [], []

    def stream():
        connection = http.client.HTTPConnection(running.host, running.port, timeout=60)
        body = json.dumps({**LONG, "stream": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        texts.append(connection.getresponse().read().decode())

    threads = [threading.Thread(target=stream)]
    threads += [threading.Thread(target=lambda: answers.append(running.call("/v1/completions", {**LONG, "n": 16})))]
    for thread in threads:
        thread.start()
        assert until(lambda: running.state.calls)
    assert until(lambda: running.engine.statistics().waiting >= 15)
    running.stop()
    started = time.monotonic()
    running.stop()
    for thread in threads:
        thread.join(10)
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert time.monotonic() - started < 8
    assert "shutting down" in texts[0]
    assert texts[0].endswith("data: [DONE]\n\n")
    assert answers[0][0] == 503


def test_tls_works(run_server, tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    settings = ServeSettings(port=0, ssl_certfile=certificate, ssl_keyfile=key)
    check_tls(settings)
    running = run_server(settings)
    assert running.url == f"https://127.0.0.1:{running.port}"
    context = ssl.create_default_context(cafile=str(certificate))
    connection = http.client.HTTPSConnection(running.host, running.port, timeout=60, context=context)
    body = json.dumps({**LONG, "max_tokens": 5, "stream": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    connection.close()
    with socket.create_connection((running.host, running.port), 10) as plain:  # without TLS it is no HTTP
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" not in plain.recv(4096)
