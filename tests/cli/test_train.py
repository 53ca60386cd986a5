"""`olmoe train`: exit codes, what goes where, and a real Ctrl-C."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from olmoe.cli.main import main
from olmoe.train.config import load_config
from olmoe.train.loop import train
from training_runs import assert_same_run, read_metrics, sections, to_toml, write_run

LIMIT = 120  # seconds after which a process counts as hung
# The command with every step slowed down, so that a signal finds it at work.
SLOW = """
import sys, time
from olmoe.cli.main import main
from olmoe.train import loop
original = loop.clip_gradients
loop.clip_gradients = lambda *arguments: (time.sleep(0.3), original(*arguments))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sentence(capsys) -> str:
    """What went to stderr, which must be one line; nothing goes to stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("olmoe: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


def test_success_prints_the_best_checkpoint_and_nothing_else(tmp_path, tokenizer_file, capfd):
    path = write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 128})
    assert main(["train", str(path)]) == 0
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'out' / 'best'}\n"
    assert "tok/s" in err
    assert re.search(r"held_out=\d\.\d{3}", err)  # what the last evaluation measured
    assert main(["train", str(path), "--resume", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert (out, err) == (f"{tmp_path / 'out' / 'best'}\n", "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"hiden_size": 8}}, "hiden_size"),
        ({"optimizer": {"learning_rate": "fast"}}, "fast"),
        ({"schedule": {"kind": "constant"}}, "constant"),
        ({"schedule": {"warmup_tokens": 10**6}}, "warmup_tokens"),
        ({"data": {"sequence_length": 64}}, "sequence_length"),
        ({"data": {"train": [{"path": "none.txt"}]}}, "none.txt"),
        ({"data": {"train": [{"path": "empty.txt"}]}}, "empty.txt"),
        ({"data": {"train": [{"path": "latin.txt"}]}}, "latin.txt"),
        ({"data": {"valid": [{"path": "empty.npy"}]}}, "empty.npy"),
        ({"data": {"train": [{"path": "short.txt"}]}}, "too few"),
        ({"data": {"tokens_folder": "train.txt"}}, "train.txt"),
        ({"model": {"vocab_size": 310, "eos_token_id": 309}}, "model.vocab_size"),
        ({"tokenizer": {"path": "train.txt"}}, "train.txt"),
        ({"run": {"output": "train.txt"}}, "train.txt"),
        ({"run": {"device": "tpu"}}, "tpu"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, tokenizer_file, capsys, changes, told):
    path = write_run(tmp_path, tokenizer_file, **changes)
    for name, content in {
        "empty.txt": b"",
        "latin.txt": b"caf\xe9\n" * 99,
        "empty.npy": b"",
        "short.txt": b"a",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert main(["train", str(path)]) == 2
    assert told in sentence(capsys)


def test_files_that_are_no_configuration_are_one_sentence(tmp_path, tokenizer_file, capsys):
    values = sections(tokenizer_file)
    del values["schedule"]
    contents = {"half.toml": to_toml(values), "text.toml": "Once upon a time", "none.toml": None, ".": None}
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
        assert main(["train", str(tmp_path / name)]) == 2
        sentence(capsys)


def test_an_existing_run_is_not_overwritten_nor_a_missing_one_created(tmp_path, tokenizer_file, capsys):
    path = write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 64})
    assert main(["train", str(path), "--resume"]) == 2
    assert "without --resume" in sentence(capsys)
    assert main(["train", str(path), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    assert "--resume" in sentence(capsys)


def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, tokenizer_file):
    """In a process of its own, between whatever instructions the signal happens to arrive."""
    path = write_run(tmp_path / "a" / "same", tokenizer_file)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A process started in the background of a script inherits that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for_metrics(process, path.parent / "out" / "metrics.jsonl")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert f"olmoe train {path} --resume" in err
    assert "Traceback" not in err
    step = read_metrics(path.parent / "out")[-1]["step"]
    assert 0 < step < 12
    assert f"step-{step:07d}" in err
    other = write_run(tmp_path / "b" / "same", tokenizer_file)
    assert main(["train", str(path), "--resume", "--quiet"]) == 0
    train(load_config(other), show_progress=False)
    assert_same_run(path.parent / "out", other.parent / "out")


def wait_for_metrics(process: subprocess.Popen, path: Path) -> None:
    """Until two steps are recorded."""
    deadline = time.monotonic() + LIMIT
    while not path.is_file() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step was finished"
        time.sleep(0.01)


def test_what_a_killed_process_leaves_does_not_confuse_its_continuation(tmp_path, tokenizer_file):
    path = write_run(tmp_path, tokenizer_file, checkpoint={"every_steps": 1}, run={"threads": 1})
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "train", str(path), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for_metrics(process, tmp_path / "out" / "metrics.jsonl")
    finally:
        process.kill()  # SIGKILL: no clean-up
        process.communicate(timeout=LIMIT)
    shutil.copytree(
        tmp_path / "out" / "checkpoints" / "step-0000001", tmp_path / "out" / "checkpoints" / ".step-9.partial"
    )
    assert main(["train", str(path), "--resume", "--quiet"]) == 0
    steps = [r["step"] for r in read_metrics(tmp_path / "out") if "cross_entropy" in r]
    assert steps == list(range(1, 13))
    assert [p.name for p in (tmp_path / "out").rglob(".*")] == []


def test_a_run_is_deleted_on_request_alone(tmp_path, tokenizer_file, capsys):
    path = write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 64})
    assert main(["train", str(path), "--quiet"]) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(["train", str(path), "--quiet"]) == 2
    assert "--overwrite" in sentence(capsys)
    again = write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 64}, data={"train": [{"path": "none.txt"}]})
    assert main(["train", str(again), "--quiet", "--overwrite"]) == 2
    assert (tmp_path / "out" / "best").is_dir()  # the new run could not start, so the old one stays
    write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 128})
    assert main(["train", str(path), "--quiet", "--overwrite"]) == 0
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-0000002"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    config = write_run(tmp_path, tokenizer_file, run={"initialize_from": "out/best"})
    assert main(["train", str(config), "--quiet", "--overwrite"]) == 2
    assert (tmp_path / "out" / "best").is_dir()


def test_a_queue_starts_a_run_and_its_continuation_alike(tmp_path, tokenizer_file, capsys, monkeypatch):
    path = write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 128})
    command = ["train", str(path), "--resume-or-start", "--quiet"]
    assert main(command) == 0
    shutil.rmtree(tmp_path / "out" / "best")
    assert main(command) == 0  # there was nothing left to do but that
    assert (tmp_path / "out" / "best" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 2
    assert "--resume-or-start decides by itself" in sentence(capsys)
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert main(command) == 2  # what somebody kept of a run is not deleted
    assert "best" in sentence(capsys)
    # But a job that torchrun starts again after a failure may begin anew, whatever it had left by then.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", str(path), "--quiet"]) == 0
    assert (tmp_path / "out" / "checkpoints" / "step-0000002").is_dir()


def test_the_mistakes_of_a_file_are_told_once_a_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    sentence(capsys)
