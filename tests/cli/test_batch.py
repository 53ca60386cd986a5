"""`olmoe batch`: files in, answers out, interrupted and resumed, and what a user is told."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from olmoe.cli import serve
from olmoe.cli.main import main
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams

OPTIONS = ["--cache-mib", "64", "--threads", "1"]


def line(name: str, **body) -> dict:
    defaults = {"prompt": f"Once upon a time {name}", "max_tokens": 6, "model": "olmoe-tiny", "temperature": 0}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": defaults | body}


def write(path, lines) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return str(path)


def read(path) -> dict[str, dict]:
    lines = [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines)
    return {each["custom_id"]: each["response"] for each in lines}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def batch(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["batch", *arguments, *OPTIONS])
    return code, *capsys.readouterr()


def test_answers_are_those_of_the_model(capsys, tmp_path, out):
    chat = {"custom_id": "chat", "url": "/v1/chat/completions"}
    messages = [{"role": "user", "content": "Hello"}]
    lines = [
        *(line(str(i)) for i in range(5)),
        chat | {"body": {"messages": messages, "max_tokens": 5, "temperature": 0}},
    ]
    lines[0]["body"]["model"] = "another"  # a warning, which --quiet leaves out
    code, shown, err = batch(capsys, write(tmp_path / "in.jsonl", lines), str(out), "--quiet")
    assert (code, shown, err) == (0, "", "")
    found, llm = read(out), LLM()
    for i in range(5):
        (expected,) = llm.generate(f"Once upon a time {i}", SamplingParams(max_new_tokens=6))
        assert found[str(i)]["body"]["choices"][0]["text"] == expected.text
    (expected,) = llm.chat(messages, SamplingParams(max_new_tokens=5))
    assert found["chat"]["body"]["choices"][0]["message"]["content"] == expected.text
    assert {each["status_code"] for each in found.values()} == {200}


def test_a_request_that_is_wrong_does_not_stop_the_others(capsys, tmp_path, out):
    lines = [line("a"), line("b", temperature=-1), line("c", stream=True), line("d")]
    code, _, err = batch(capsys, write(tmp_path / "in.jsonl", lines), str(out))
    assert code == 1
    assert "olmoe: 2 of 4 requests failed; their lines say why\n" in err
    found = read(out)
    assert {name: each["status_code"] for name, each in found.items()} == {"a": 200, "b": 400, "c": 400, "d": 200}
    assert found["b"]["body"]["error"]["param"] == "temperature"


def test_finished_requests_are_skipped(capsys, tmp_path, out, monkeypatch):
    source = write(tmp_path / "in.jsonl", [line(str(i)) for i in range(4)])
    assert batch(capsys, source, str(out), "--quiet")[0] == 0
    whole = out.read_bytes()
    kept = whole.splitlines(keepends=True)[:2]
    out.write_bytes(b"".join(kept) + b'{"id":"batch_req_12')  # as a power cut leaves it
    code, _, err = batch(capsys, source, str(out))
    assert code == 0
    assert "olmoe: 2 of 4 requests are answered already" in err
    assert out.read_bytes().startswith(b"".join(kept))
    assert set(read(out)) == {"0", "1", "2", "3"}
    monkeypatch.setattr("olmoe.cli.batch.load_state", None)  # nothing is loaded for nothing
    assert batch(capsys, source, str(out), "--quiet")[0] == 0


def test_overwrite_starts_anew(capsys, tmp_path, out):
    source = write(tmp_path / "in.jsonl", [line("a")])
    out.write_text("something else\n", encoding="utf-8")
    code, _, err = batch(capsys, source, str(out))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"olmoe: Line 1 of {out} is not an answer to a batch; ")
    assert batch(capsys, source, str(out), "--quiet", "--overwrite")[0] == 0
    assert set(read(out)) == {"a"}


def test_stdin_and_stdout(capfdbinary, monkeypatch):
    data = json.dumps(line("a")).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["batch", "-", "-", "--quiet", *OPTIONS]) == 0
    (written,) = capfdbinary.readouterr().out.splitlines()
    assert json.loads(written)["custom_id"] == "a"


def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, out):
    source = write(tmp_path / "in.jsonl", [line(str(i), max_tokens=400, ignore_eos=True) for i in range(60)])
    command = [sys.executable, "-m", "olmoe", "batch", source, str(out), "--in-flight", "2", "--max-rows", "2"]
    process = subprocess.Popen([*command, *OPTIONS], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    done = len(read(out))
    assert 2 <= done < 60
    assert f"olmoe: stopped; {done} of 60 requests are answered in {out}; the same command continues\n" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([line("a"), line("a")], "olmoe: Lines 1 and 2 of IN have the same custom_id 'a'; each needs its own.\n"),
        (["x", line("a")], "olmoe: Line 1 of IN must be an object with custom_id, url and body, not 'x'.\n"),
        ([], "olmoe: IN holds no requests; write one JSON object per line.\n"),
    ],
)
def test_a_wrong_file_is_one_sentence_before_anything_runs(capsys, monkeypatch, tmp_path, lines, sentence):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "IN", lines)
    monkeypatch.setattr("olmoe.cli.batch.load_state", None)
    assert batch(capsys, "IN", "OUT") == (2, "", sentence)
    assert not os.path.exists("OUT")


def test_a_file_is_not_written_onto_itself(capsys, tmp_path):
    source = write(tmp_path / "in.jsonl", [line("a")])
    assert batch(capsys, source, source) == (2, "", f"olmoe: IN and OUT are both {source}; choose another OUT.\n")


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "_EXTRA", ("no_such_package",))
    code, _, err = batch(capsys, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert code == 2
    assert err == 'olmoe: olmoe batch needs no_such_package; install it with: pip install "olmoe[serve]"\n'


@pytest.mark.parametrize("option", ["--in-flight", "--max-rows", "--token-budget", "--context-length"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_no_number_below_one(capsys, tmp_path, option, value):
    code, out, err = batch(capsys, write(tmp_path / "in.jsonl", [line("a")]), "-", option, value)
    assert (code, out, err) == (2, "", f"olmoe: {option} must be a whole number, at least 1, not {value}.\n")


def test_a_router_policy_for_requests_without_one(capsys, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text('{"ban": [{"layer": 0, "expert": 5}], "temperature": 3.0}', encoding="utf-8")
    own = json.loads(policy.read_text(encoding="utf-8"))
    lines = [line("none"), line("empty", router_policy={}), line("other", router_policy={"k": 3, "temperature": 2.0})]
    for each in lines:
        each["body"]["prompt"] = "Once upon a time"
    answers = []
    for requests, options in (
        (lines, ["--router-policy", str(policy)]),
        (
            [
                line("none", prompt="Once upon a time", router_policy=own),
                line("empty", prompt="Once upon a time"),
                lines[2],
            ],
            [],
        ),
    ):
        target = tmp_path / f"out{len(options)}.jsonl"
        assert batch(capsys, write(tmp_path / "in.jsonl", requests), str(target), "--quiet", *options)[0] == 0
        found = {name: each["body"]["choices"][0]["text"] for name, each in read(target).items()}
        answers.append(found)
    assert answers[0] == answers[1]
    assert len(set(answers[0].values())) == 3
    policy.write_text('{"ban": [{"expert": 99}]}', encoding="utf-8")
    code, _, err = batch(
        capsys, str(tmp_path / "in.jsonl"), str(tmp_path / "new.jsonl"), "--router-policy", str(policy)
    )
    assert code == 2
    assert "the expert 99, but the model's are 0 to 63" in err
