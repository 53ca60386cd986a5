"""Training an experiment's runs: in worker processes, each once, resuming what was interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmoe.errors import UserError
from olmoe.train.config import load_config
from olmoe.train.experiment import schedule
from olmoe.train.experiment.definition import load_experiment
from olmoe.train.experiment.runs import lay_out
from olmoe.train.experiment.schedule import train_all
from olmoe.train.loop import train
from small_experiments import DENSE, TOKENS, write_experiment
from training_runs import assert_same_run, read_metrics, write_run

LIMIT = 180  # seconds after which a process counts as hung


def runs_of(path, output, seeds=1, scale=1.0):
    return lay_out(load_experiment(path), output, seeds, scale)


def modified(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.name == "evaluation.json"}


def test_runs_equal_olmoe_train_on_their_configuration(tmp_path, tokenizer_file):
    path = write_experiment(tmp_path / "a" / "same", tokenizer_file)
    runs = runs_of(path, tmp_path / "out")
    told = []
    train_all(runs, jobs=2, progress=lambda tokens, words: told.append((tokens, words)))
    assert all(run.is_finished for run in runs)
    assert told[-1] == (2 * TOKENS, "2 of 2 runs, 0 at work")
    assert [tokens for tokens, _ in told] == sorted(tokens for tokens, _ in told)
    assert any(words.endswith("2 at work") for _, words in told)
    same = write_run(tmp_path / "b" / "same", tokenizer_file, run={"seed": 1})
    train(load_config(same), show_progress=False)
    assert_same_run(runs[1].folder, same.parent / "out")


def test_finished_runs_are_not_trained_again(tmp_path, tokenizer_file, monkeypatch):
    path = write_experiment(tmp_path, tokenizer_file)
    train_all(runs_of(path, tmp_path / "out"))
    before = modified(tmp_path / "out")
    train_all(runs_of(path, tmp_path / "out", seeds=2))
    after = modified(tmp_path / "out")
    assert len(before) == 2
    assert len(after) == 4
    assert before.items() <= after.items()
    monkeypatch.setattr(schedule.subprocess, "Popen", None)  # nothing is left to start
    train_all(runs_of(path, tmp_path / "out", seeds=2))


def test_a_run_waits_for_its_starting_run_and_continues_its_curve(tmp_path, tokenizer_file):
    arms = {
        "half": {"model": DENSE, "compared": False},
        "on": {"start": "half"},
        "normalized": {"start": "half", "upcycle": {"experts": 4, "top_k": 2, "form": "normalized"}},
        "plain": {"start": "half", "upcycle": {"experts": 4, "top_k": 2, "form": "plain"}},
    }
    runs = runs_of(write_experiment(tmp_path, tokenizer_file, arms), tmp_path / "out")
    train_all(runs, jobs=3)
    half, on, normalized, plain = runs
    assert all(run.is_finished for run in runs)
    assert not (half.folder / "start.json").exists()
    losses = {}
    for run in (on, normalized, plain):
        record = json.loads((run.folder / "start.json").read_text(encoding="utf-8"))
        (losses[run.arm.name],) = record["held_out_loss"].values()
    best = min(next(iter(r["held_out_loss"].values())) for r in half.records() if "held_out_loss" in r)
    assert losses["on"] == pytest.approx(best, abs=2e-5)
    assert losses["normalized"] == pytest.approx(best, abs=1e-4)  # keeps the function
    assert abs(losses["plain"] - best) > 1e-3  # does not
    config = json.loads((normalized.folder / "best" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_experts"], config["norm_topk_prob"]) == (4, True)


def test_bad_data_is_refused_before_training(tmp_path, tokenizer_file):
    path = write_experiment(tmp_path, tokenizer_file)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"valid\.txt"):
        train_all(runs_of(path, tmp_path / "out"))
    assert list((tmp_path / "out").rglob("log.txt")) == []
    with pytest.raises(UserError, match="At least 1 run"):
        train_all(runs_of(path, tmp_path / "out"), jobs=0)


def test_a_failing_run_is_named_and_the_others_are_saved(tmp_path, tokenizer_file):
    arms = {"good": {}, "wild": {"optimizer": {"learning_rate": 1e18}}}
    runs = runs_of(
        write_experiment(tmp_path, tokenizer_file, arms, schedule={"total_tokens": 4000 * 64}), tmp_path / "o"
    )
    with pytest.raises(UserError, match=r"^wild, seed 1: The .* lower optimizer\.learning_rate"):
        train_all(runs, jobs=2)
    assert not runs[0].is_finished
    # It had started to train, or was still importing torch.
    assert runs[0].has_begun or not (runs[0].folder / "metrics.jsonl").exists()


def test_a_worker_that_dies_is_reported(tmp_path, tokenizer_file, monkeypatch):
    runs = runs_of(write_experiment(tmp_path, tokenizer_file), tmp_path / "out")
    monkeypatch.setattr(schedule.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"dense, seed 1 ended with code 1; see .*log\.txt"):
        train_all(runs)


SLOW = """
import sys, time
from olmoe.train import loop
original = loop.clip_gradients
loop.clip_gradients = lambda *arguments: (time.sleep(0.3), original(*arguments))[1]
"""
COMMAND = "import sys; from olmoe.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_interrupted_experiment_leaves_no_process_and_resumes_to_the_same_result(tmp_path, tokenizer_file, number):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW, encoding="utf-8")
    path = write_experiment(tmp_path / "a" / "same", tokenizer_file)
    arguments = ["experiment", str(path), "--seeds", "1", "--jobs", "2", "--no-figure"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "slow")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    runs = runs_of(path, path.parent / "runs" / "small")
    try:
        wait_for(lambda: any(steps(run) >= 2 for run in runs), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    wait_for(lambda: not any((run.folder / "lock").exists() for run in runs))  # each process released its lock
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        assert (out, err) == ("", "olmoe: interrupted, saved; 0 of 2 runs are finished. The same command continues.\n")
    assert not any(run.is_finished for run in runs)
    assert any(run.has_begun for run in runs)
    stopped = {run.arm.name: steps(run) for run in runs}
    assert all(count < 12 for count in stopped.values())
    train_all(runs, jobs=2)
    fresh = runs_of(write_experiment(tmp_path / "b" / "same", tokenizer_file), tmp_path / "out")
    train_all(fresh, jobs=2)
    for run, other in zip(runs, fresh, strict=True):
        assert_same_run(run.folder, other.folder)


def steps(run) -> int:
    try:
        return len(read_metrics(run.folder))
    except (FileNotFoundError, AssertionError):
        return 0


def wait_for(condition, process=None):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
