"""Batch files: what is refused before anything runs, and how an interrupted run continues."""

from __future__ import annotations

import io
import json
import os
import sys
import threading

import pytest

from olmoe.serve.batch_file import BatchInput, BatchLine, BatchOutput, result
from sentences import refused


def line(custom_id="a", url="/v1/completions", **changes) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"prompt": custom_id}} | changes


def write(path, *lines) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return str(path)


def test_requests_can_be_read_repeatedly(tmp_path):
    path = tmp_path / "in.jsonl"
    text = "\ufeff" + json.dumps(line("ä")) + "\r\n\n" + json.dumps(line("b", "/v1/chat/completions"))
    path.write_text(text, encoding="utf-8")
    batch = BatchInput(path)
    expected = [
        BatchLine(1, "ä", "/v1/completions", {"prompt": "ä"}),
        BatchLine(3, "b", "/v1/chat/completions", {"prompt": "b"}),
    ]
    assert list(batch) == list(batch) == expected
    assert len(batch) == 2
    batch.close()


def test_requests_may_come_from_stdin(monkeypatch):
    data = (json.dumps(line("a")) + "\n" + json.dumps(line("b"))).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    batch = BatchInput("-")
    assert [each.custom_id for each in batch] == [each.custom_id for each in batch] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(line()) + "\nnot json\n", "Line 2 of IN is not JSON; each line is one object"),
        ("\n" + json.dumps(line()) + "\n\n" + json.dumps(line()), "Lines 2 and 4 of IN have the same custom_id 'a'"),
        ("[1]", "Line 1 of IN must be an object with custom_id, url and body, not [1]."),
        (json.dumps(line(3)), "custom_id must be a text in line 1 of IN, not 3."),
        (json.dumps(line("")), "custom_id must be a text in line 1 of IN, not ''."),
        (json.dumps(line(method="GET")), "method must be POST in line 1 of IN, not 'GET'."),
        (
            json.dumps(line(url="/v1/embeddings")),
            "url must be /v1/completions, /v1/chat/completions or /v1/responses in line 1 of IN, not '/v1/embeddings'.",
        ),
        (json.dumps(line(body="x")), "body must be an object in line 1 of IN, not 'x'."),
        ("\n \n", "IN holds no requests; write one JSON object per line."),
        ("[" * 100_000, "Line 1 of IN is not JSON;"),
        ("caf\udce9", "Line 1 of IN is not JSON;"),
    ],
)
def test_invalid_batches_are_refused(tmp_path, monkeypatch, content, sentence):
    (tmp_path / "IN").write_bytes(content.encode("utf-8", "surrogateescape"))
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: BatchInput("IN")).startswith(sentence)


def test_a_missing_file_is_refused(tmp_path):
    assert refused(lambda: BatchInput("no.jsonl")) == "There is no batch file 'no.jsonl'; check its name."
    assert "Is a directory" in refused(lambda: BatchInput(tmp_path))


# ---- output ----


def answers(path) -> list[str]:
    return [json.loads(each)["custom_id"] for each in path.read_text(encoding="utf-8").splitlines()]


def test_output_lines_are_openais(tmp_path):
    path = tmp_path / "sub" / "out.jsonl"
    with BatchOutput(path, ["a"]) as output:
        output.write(result("a", 200, {"text": "ü"}))
    (written,) = path.read_text(encoding="utf-8").splitlines()
    value = json.loads(written)
    assert list(value) == ["id", "custom_id", "response", "error"]
    assert value["id"].startswith("batch_req_")
    assert value["response"] | {"request_id": 0} == {"status_code": 200, "request_id": 0, "body": {"text": "ü"}}
    assert value["error"] is None


@pytest.mark.parametrize("cut", [1, 10, 30, None])
def test_a_partial_last_line_is_removed_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    with BatchOutput(path, "abc") as output:
        output.write(result("a", 200, {}))
        output.write(result("b", 400, {}))
    whole = path.read_bytes()
    with BatchOutput(path, "abc") as output:
        output.write(result("c", 200, {}))
    torn = path.read_bytes()[: len(whole) + cut] if cut else path.read_bytes()[:-1]
    path.write_bytes(torn)
    with BatchOutput(path, "abc") as output:
        assert output.finished == {"a": 200, "b": 400}
        output.write(result("c", 200, {}))
    assert answers(path) == ["a", "b", "c"]


def test_an_unrelated_output_file_is_not_modified(tmp_path):
    path = tmp_path / "out.jsonl"
    for content, sentence in (
        ("a text\n", "Line 1 of "),
        ("a text", "Line 1 of "),
        ('{"custom_id": "a"}\n', "Line 1 of "),
        (json.dumps(result("z", 200, {})) + "\n", "answers the custom_id 'z', which the input does not have"),
    ):
        path.write_text(content, encoding="utf-8")
        message = refused(lambda: BatchOutput(path, ["a"]))
        assert sentence in message
        assert message.endswith("choose another file, or start again with --overwrite.")
        assert path.read_text(encoding="utf-8") == content
    with BatchOutput(path, ["a"], overwrite=True) as output:
        assert output.finished == {}
    assert path.read_bytes() == b""


def test_two_runs_cannot_write_the_same_file(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "out.jsonl"
    with BatchOutput(path, ["a"]):
        assert refused(lambda: BatchOutput(path, ["a"], overwrite=True)).startswith("Another olmoe batch is writing ")
    BatchOutput(path, ["a"]).close()


def test_answers_are_flushed_to_disk_regularly(tmp_path, monkeypatch):
    from olmoe.serve import batch_file

    synced = []
    monkeypatch.setattr(batch_file.os, "fsync", lambda fd: synced.append(fd))
    with BatchOutput(tmp_path / "out.jsonl", map(str, range(200))) as output:
        for i in range(130):
            output.write(result(str(i), 200, {}))
        assert len(synced) == 2
    assert len(synced) == 3


def test_an_unwritable_path_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "cannot be written (File exists)" in refused(lambda: BatchOutput(tmp_path / "file" / "out", []))
    assert "cannot be written (Is a directory)" in refused(lambda: BatchOutput(tmp_path, []))
    # An endless output is not searched for earlier answers.
    assert "/dev/full is not a regular file" in refused(lambda: BatchOutput("/dev/full", []))


def test_requests_may_come_from_a_pipe(tmp_path):
    """As from a shell's <(command)."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes here")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(json.dumps(line("a")) + "\n" + json.dumps(line("b"))))
    writer.start()
    batch = BatchInput(pipe)
    writer.join()
    assert [each.custom_id for each in batch] == [each.custom_id for each in batch] == ["a", "b"]
    batch.close()


def test_an_id_that_is_not_valid_unicode_is_matched_again(tmp_path):
    name = "\ud83d"
    with BatchOutput(tmp_path / "out", {name: 1}) as output:
        output.write(result(name, 200, {}))
    with BatchOutput(tmp_path / "out", {name: 1}) as output:
        assert output.finished == {name: 200}
