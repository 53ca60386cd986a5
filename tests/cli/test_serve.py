"""`olmoe serve` as a process: what it says, what it refuses at once, and how signals end it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from olmoe import runtime
from olmoe.cli import main as cli
from olmoe.cli import serve
from olmoe.errors import UserError
from ports import kept_port

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

LONG = {"prompt": "Once upon a time", "max_tokens": 490, "temperature": 0, "ignore_eos": True}


class Process:
    """A server in a process of its own, once it says where it is."""

    def __init__(self, *arguments: str, stderr=subprocess.PIPE, env=None) -> None:
        command = [sys.executable, "-m", "olmoe", "serve", "--port", "0", "--cache-mib", "64", *arguments]
        self.process = subprocess.Popen(command, stderr=stderr, text=True, env={**os.environ, **(env or {})})
        self.said: list[str] = []

    def wait_for_url(self) -> str:
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"API (https?)://([^:]+):(\d+)/v1", line):
                self.host, self.port = found[2], int(found[3])
                return found[0].removeprefix("API ")
        raise AssertionError("".join(self.said))

    def call(self, path: str, body=None, headers=None):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        content = None if body is None else json.dumps(body)
        sent = {"content-type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", path, content, sent)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture
def kept():
    with kept_port() as port:
        yield port


@pytest.fixture
def start():
    processes = []

    def run(*arguments: str, **options) -> Process:
        processes.append(Process(*arguments, **options))
        return processes[-1]

    yield run
    for each in processes:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        if each.process.stderr:
            each.process.stderr.close()


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["serve", *arguments]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


def test_it_says_where_it_is_serves_and_drains(start):
    server = start("--served-model-name", "mine", "--served-model-name", "alias")
    server.wait_for_url()
    said = "".join(server.said)
    assert "model mine, context 512 tokens" in said
    assert "cache 64 MiB, fixed: 32768 tokens" in said
    assert "no key needed" in said
    assert [card["id"] for card in server.call("/v1/models")[1]["data"]] == ["mine", "alias"]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.call("/v1/completions", {**LONG, "model": "alias"})))
    thread.start()
    wait_until_it_runs(server, "mine", thread)
    server.process.send_signal(signal.SIGINT)
    thread.join(60)
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 490
    assert server.process.wait(20) == 0
    assert "stopping after the answers in progress (1 request)" in server.process.stderr.read()


def wait_until_it_runs(server: Process, model: str, thread: threading.Thread) -> None:
    """Until the first row of what a thread has asked for is generated."""
    while f'running{{engine="0",model_name="{model}"}} 1.0' not in metrics(server):
        assert thread.is_alive()
        time.sleep(0.005)


def metrics(server: Process) -> str:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_the_second_signal_ends_at_once(start):
    server = start("--max-rows", "1")
    server.wait_for_url()
    answers = []
    body = {**LONG, "n": 16}
    thread = threading.Thread(target=lambda: answers.append(server.call("/v1/completions", body)))
    thread.start()
    wait_until_it_runs(server, "olmoe-tiny", thread)
    server.process.send_signal(signal.SIGTERM)
    # Of two signals that a process has not seen yet the system keeps one.
    assert any("a second signal stops at once" in line for line in server.process.stderr)
    server.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert server.process.wait(20) == 0
    assert time.monotonic() - started < 10
    thread.join(20)
    assert answers[0][0] == 503


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys, monkeypatch):
    import olmoe.engine.llm

    monkeypatch.setattr(olmoe.engine.llm, "LLM", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refused(capsys, "--port", str(port))
    assert sentence == f"olmoe: Port {port} of 127.0.0.1 is in use; choose another with --port, 0 for any."


def test_without_the_extra_it_says_how_to_install_it(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "starlette" else find(name))
    assert refused(capsys) == 'olmoe: olmoe serve needs starlette; install it with: pip install "olmoe[serve]"'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "99999"], "The port must be between 0 and 65535"),
        (["--host", "nowhere.invalid"], "is unknown"),
        (["--cache-mib", "0"], "--cache-mib must be a whole number, at least 1, not 0"),
        (["--cache-mib", "100000000000", "--port", "0"], "There is no memory for a cache of 100000000000 MiB"),
        (["--cache-mib", str(10**20), "--port", "0"], "There is no memory for a cache of 100000000000000000000 MiB"),
        (["--served-model-name", ""], "--served-model-name must be a name of printable characters, not ''"),
        (["--served-model-name", "a\x1b[31m"], "--served-model-name must be"),
        (["--allowed-host", "https://a.org"], "--allowed-host must be a name such as"),
        (["--cors-origin", "app.example.org"], "--cors-origin must be * or an origin such as"),
        (["--cors-origin", "https://app.example.org/"], "not 'https://app.example.org/'"),
        (["--token-budget", "0"], "--token-budget must be"),
        (["--api-key", ""], "An API key is empty"),
        (["--api-key-file", "none.txt"], "none.txt cannot be read"),
        (["--ssl-certfile", "none.pem"], "none.pem and its key cannot be used"),
        (["--model", "no/such/folder/here", "--port", "0"], "no/such/folder/here"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, sentence):
    assert sentence in refused(capsys, *arguments)


def test_a_cache_larger_than_what_is_free_is_warned_about(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: 100 * 2**20)
    monkeypatch.setattr(runtime, "total_memory_bytes", lambda: 300 * 2**20)
    for mib, device, warned in ((100, "cpu", False), (101, "cpu", True), (101, "cuda", False)):
        caplog.clear()
        serve._check_memory(mib, torch.device(device))
        assert ("only 100 MiB of memory are free" in caplog.text) == warned
    with pytest.raises(UserError, match="There is no memory for a cache of 301 MiB"):
        serve._check_memory(301, torch.device("cpu"))


def test_names_that_are_not_its_own(start):
    """A page elsewhere must not reach a server without keys by having its own name point to this machine."""
    for options, foreign, own in (
        ([], 403, 403),
        (["--allowed-host", "own.example"], 403, 200),
        (["--allowed-host", "*"], 200, 200),
        (["--api-key", "k"], 200, 200),
    ):
        server = start(*options)
        server.wait_for_url()
        key = {"authorization": "Bearer k"}
        assert server.call("/v1/models", headers={**key, "host": "evil.example:8000"})[0] == foreign
        assert server.call("/v1/models", headers={**key, "host": "own.example:8000"})[0] == own
        assert server.call("/v1/models", headers={**key, "host": f"localhost:{server.port}"})[0] == 200
        assert server.end() == 0


def test_keys_from_everywhere(start, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# ours\nfrom-file\n", encoding="utf-8")
    keys = ["--api-key", "given", "--api-key-file", str(path)]
    server = start(*keys, "--access-log", env={"OLMOE_API_KEY": "from-env,second"})
    server.wait_for_url()
    assert "no key needed" not in "".join(server.said)
    for key in ("given", "from-file", "from-env", "second"):
        assert server.call("/v1/models", headers={"authorization": f"Bearer {key}"})[0] == 200
    assert server.call("/v1/models")[0] == 401
    assert server.end() == 0
    log = server.process.stderr.read()
    assert '"GET /v1/models HTTP/1.1" 200' in log
    assert "from-env" not in log


def test_an_open_address_without_a_key_is_warned_about(start):
    server = start("--host", "0.0.0.0")
    server.wait_for_url()
    assert "everybody who reaches 0.0.0.0 can use this server; set a key with --api-key" in "".join(server.said)
    assert server.end() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_for_logs_does_not_end_it(kept, start):
    with open("/dev/full", "w") as full:
        server = start("--access-log", "--port", str(kept), stderr=full)
    server.host, server.port = "127.0.0.1", kept
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            status, _ = server.call("/ready")
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    assert status == 200
    for _ in range(3):
        assert server.call("/v1/completions", {**LONG, "max_tokens": 2, "unknown_field": 1})[0] == 200
    assert server.end() == 0


def test_a_broken_pipe_for_logs_does_not_end_it(start):
    server = start("--access-log")
    server.wait_for_url()
    server.process.stderr.close()
    for _ in range(3):
        assert server.call("/v1/completions", {**LONG, "max_tokens": 2})[0] == 200
    server.process.stderr = None
    assert server.end() == 0


def test_a_router_policy_for_requests_without_one(start, capsys, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text('{"pin": [{"layer": 1, "expert": 3}], "temperature": 3}', encoding="utf-8")
    server = start("--router-policy", str(policy))
    server.wait_for_url()
    (card,) = server.call("/v1/models")[1]["data"]
    assert card["olmoe"]["router_policy"] == {"pin": [{"layer": 1, "expert": 3}], "temperature": 3.0}
    asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    first, own = (
        server.call("/v1/completions", asked | more)[1]["choices"][0]["text"] for more in ({}, {"router_policy": {}})
    )
    assert first != own
    assert server.end() == 0
    for content, sentence in (
        ('{"pins": []}', "it has the key 'pins'"),
        ('{"k": 65}', "from 1 to 64 experts per token, not 65"),
    ):
        policy.write_text(content, encoding="utf-8")
        assert sentence in refused(capsys, "--port", "0", "--router-policy", str(policy))
