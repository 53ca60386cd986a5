"""Host names that a server answers to: a foreign name that points to this machine is refused."""

from __future__ import annotations

import pytest

from olmoe.errors import UserError
from olmoe.serve.hosts import is_loopback, names_to_check
from olmoe.serve.state import ServeSettings


def test_loopback_names_are_accepted():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.1", "example.com")))


def test_a_loopback_server_without_keys_checks_host_names():
    assert names_to_check([], "127.0.0.1", keys=False) == ("localhost",)
    assert names_to_check([], "127.0.0.1", keys=True) == ()  # a browser does not know the key
    assert names_to_check([], "0.0.0.0", keys=False) == ()  # whose names the server cannot know
    assert names_to_check(["LLM.example.org."], "0.0.0.0", keys=True) == ("llm.example.org",)
    assert names_to_check(["*"], "127.0.0.1", keys=False) == ()
    for wrong in ("http://a.org", "a.org:80", "a.*", "", "a b"):
        with pytest.raises(UserError, match="--allowed-host must be a name such as"):
            names_to_check([wrong], "127.0.0.1", keys=False)


def test_other_host_names_are_refused(run_server):
    running = run_server(ServeSettings(port=0, allowed_hosts=("llm.example.org", "*.inner.example")))
    ours = ["localhost", "LOCALHOST:80", "app.localhost:8000", "127.0.0.1", "10.0.0.7:8000", "[::1]:8000", "[::1]"]
    ours += ["llm.example.org", "LLM.example.org.:443", "a.inner.example", "a.b.inner.example", ""]
    for host in ours:
        assert running.call("/health", headers={"host": host})[0] == 200, host
    others = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "inner.example"]
    others += ["xllm.example.org", "[::1", "[evil]", "a:b:c", "127.0.0.1@evil.example"]
    for host in others:
        status, answer, _ = running.call("/v1/models", headers={"host": host})
        assert (status, answer["error"]["type"]) == (403, "permission_error"), host
        assert "--allowed-host" in answer["error"]["message"]
    status, answer, _ = running.call("/v1/messages", {}, headers={"host": "evil.example"})
    assert (status, answer["type"], answer["error"]["type"]) == (403, "error", "permission_error")


def test_any_host_name_is_accepted_without_the_check(server):
    assert server.call("/health", headers={"host": "anything.example"})[0] == 200
