"""Whole training runs, small enough to repeat: what they write, and exact resumption."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from configurations import VOCAB_SIZE
from olmoe.errors import ConfigError, UserError
from olmoe.io import hub
from olmoe.model import CausalLM, initialize
from olmoe.train import loop, state
from olmoe.train.config import LossConfig, TrainConfig, load_config
from olmoe.train.data import Mixture, prepare
from olmoe.train.evaluation import evaluate
from olmoe.train.loop import Interrupted, train
from olmoe.train.losses import objective
from olmoe.train.optim import learning_rate
from olmoe.weights import checkpoint
from packed_folders import packed_folder
from sentences import refused
from training_runs import assert_same_run, at_step, copy_of, files, fixed, read_metrics, text, write_run

STEPS = 12


def run(folder: Path, tokenizer: Path | str, /, *, resume: bool = False, **changes) -> Path:
    """Write a run into `folder` (unless it is to be resumed), train it and return its output folder."""
    path = folder / "run.toml" if resume and not changes else write_run(folder, tokenizer, **changes)
    train(load_config(path), resume=resume, show_progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_file) -> Path:
    """The output of an uninterrupted run, to compare others with."""
    return run(tmp_path_factory.mktemp("finished"), tokenizer_file)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)  # to this thread: a signal to the process may be handled later


# ---- what a run writes ----


def test_a_run_leaves_metrics_checkpoints_the_best_and_its_evaluation(finished):
    assert files(finished) == ["best", "checkpoints", "evaluation.json", "metrics.jsonl"]
    assert files(finished / "checkpoints") == ["step-0000009", "step-0000012"]
    assert checkpoint.load(finished / "best").config.num_experts == 4
    records = read_metrics(finished)
    steps = [r for r in records if "cross_entropy" in r]
    held_out = [r for r in records if "held_out_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in steps] == [64 * step for step in range(1, STEPS + 1)]
    assert [r["step"] for r in held_out] == [4, 8, 12]
    assert all(r["load_balancing"] > 0 and r["router_z"] > 0 and r["tokens_per_second"] > 0 for r in steps)
    assert all(1 <= r["max_load_over_mean"] <= 4 for r in steps)
    assert {sum(layer) for r in steps for layer in r["expert_load"]} == {64 * 2}  # two experts per token
    name = f"{finished.parent.name}-valid"
    assert all(list(r["bits_per_byte"]) == list(r["held_out_loss"]) == [name] for r in held_out)


def test_rates_follow_the_schedule(finished):
    config = load_config(finished.parent / "run.toml")
    rates = [r["learning_rate"] for r in read_metrics(finished) if "learning_rate" in r]
    assert rates == [learning_rate(config.schedule, 1e-2, 64 * step) for step in range(STEPS)]
    assert rates[0] == pytest.approx(1e-3)  # a tenth of the peak


def test_steps_match_ones_written_out_by_hand(finished, tokenizer_file):
    """Windows in order, two microbatches per step, clipping, the scheduled rate, AdamW on everything."""
    config, folder = load_config(finished.parent / "run.toml"), finished.parent
    file = prepare(folder / "train.txt", tokenizer_file, folder / "tokens", VOCAB_SIZE - 1)
    mixture = Mixture([(np.fromfile(file.path, dtype="<u2"), 1.5)], 16, seed=3)
    model = CausalLM(config.model)
    initialize(model, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    records = [r for r in read_metrics(finished) if "cross_entropy" in r]
    for step, record in enumerate(records[:9]):
        optimizer.param_groups[0]["lr"] = learning_rate(config.schedule, 1e-2, 64 * step)
        parts = []
        for first in (4 * step, 4 * step + 2):
            windows = torch.from_numpy(np.stack([mixture.window(first), mixture.window(first + 1)]))
            parts.append(objective(model, windows, LossConfig(), positions_in_step=64, microbatches=2))
            parts[-1].objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loads = parts[0].counts_LE + parts[1].counts_LE
        expected = {
            "cross_entropy": float(parts[0].cross_entropy + parts[1].cross_entropy),
            "load_balancing": float(parts[0].load_balancing + parts[1].load_balancing) / 2,
            "router_z": float(parts[0].router_z + parts[1].router_z) / 2,
            "grad_norm": float(norm),
            "max_load_over_mean": sum(max(layer) / (sum(layer) / 4) for layer in loads.tolist()) / 2,
        }
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-3), step
    saved = checkpoint.load(finished / "checkpoints" / "step-0000009")
    for (name, a), b in zip(model.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_falls(finished):
    losses = [r["cross_entropy"] for r in read_metrics(finished) if "cross_entropy" in r]
    # The denominator also counts the last position of each window, which predicts nothing.
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE) * 15 / 16, rel=0.02)
    assert np.mean(losses[-3:]) < losses[0] - 0.5


def test_the_final_evaluation_is_of_the_best_checkpoint_on_whole_files(finished, tokenizer_file):
    report = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    folder = finished.parent
    file = prepare(folder / "valid.txt", tokenizer_file, folder / "tokens", VOCAB_SIZE - 1)
    tokens = np.fromfile(file.path, dtype="<u2")
    expected = evaluate(checkpoint.load(finished / "best"), file, tokens, 16)
    assert report["bits_per_byte"] == {file.name: pytest.approx(expected.bits_per_byte, abs=1e-4)}
    assert report["held_out_loss"] == {file.name: pytest.approx(expected.loss, abs=1e-4)}
    assert report["expert_load_LE"] == {file.name: expected.counts_LE.tolist()}
    assert report["step"] == 12


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(tmp_path, tokenizer_file, monkeypatch):
    scores = iter([2.0, 1.0, 1.0])  # the last only equals the best and does not replace it
    monkeypatch.setattr(loop, "_score", lambda results: next(scores))
    output = run(tmp_path, tokenizer_file, checkpoint={"every_steps": 4, "keep": 9})
    best = (output / "best" / "model.safetensors").read_bytes()
    saved = {p.name: (p / "model.safetensors").read_bytes() for p in (output / "checkpoints").iterdir()}
    assert [name for name, content in saved.items() if content == best] == ["step-0000008"]
    assert '"step": 8' in (output / "evaluation.json").read_text(encoding="utf-8")


def test_without_held_out_files_the_last_state_is_the_best(tmp_path, tokenizer_file):
    output = run(tmp_path, tokenizer_file, data={"valid": []}, schedule={"total_tokens": 5 * 64})
    best = (output / "best" / "model.safetensors").read_bytes()
    assert best == (output / "checkpoints" / "step-0000005" / "model.safetensors").read_bytes()
    assert [r["step"] for r in read_metrics(output) if "held_out_loss" in r] == [4, 5]


def test_token_files_train_and_evaluate_without_any_text(tmp_path, tokenizer_file):
    generator = np.random.default_rng(0)
    for name in ("train.npy", "val/c4/part-0.npy", "val/wiki/part-0.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        generator.integers(0, VOCAB_SIZE, 400).astype("<u2").tofile(tmp_path / name)
    data = {
        "train": [{"path": "train.npy"}],
        "valid": [{"path": "val/c4/part-0.npy"}],
        "measure": [{"path": "val/wiki/part-0.npy"}],
    }
    output = run(tmp_path, tokenizer_file, data=data, schedule={"total_tokens": 256})
    (record,) = [r for r in read_metrics(output) if "held_out_loss" in r]
    assert record["bits_per_byte"] == {"c4-part-0": None}  # the bytes of foreign tokens' text are unknown
    assert state.restore(output / "checkpoints" / "step-0000004", *fresh(output), {}).best < 20  # the loss instead
    assert '"wiki-part-0"' in (output / "evaluation.json").read_text(encoding="utf-8")


def fresh(output: Path):
    model = checkpoint.load(output / "best").requires_grad_(True)
    return model, loop.build_optimizer(model, load_config(output.parent / "run.toml").optimizer)


def test_a_missing_tokenizer_is_trained_on_the_training_texts(tmp_path):
    write_run(tmp_path, "new/tokenizer.json", tokenizer={"vocab_size": 300}, model={"eos_token_id": 299})
    train(load_config(tmp_path / "run.toml"), show_progress=False)
    made = (tmp_path / "new" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "best" / "tokenizer.json").read_bytes() == made


def test_the_progress_bar_goes_to_stderr(tmp_path, tokenizer_file, capfd):
    write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 128})
    train(load_config(tmp_path / "run.toml"))
    out, err = capfd.readouterr()
    assert out == ""
    assert "tok/s" in err
    assert "loss=" in err


# ---- interruptions ----


@pytest.mark.parametrize("step", [1, 5, 8, 9, 12])  # first, in between, at an evaluation, at a checkpoint, last
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, finished, monkeypatch, step):
    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, loop, step, interrupt)
    folder = copy_of(finished, tmp_path)
    config = load_config(folder / "run.toml")
    with pytest.raises(Interrupted) as caught:
        train(config, show_progress=False)
    assert caught.value.path == folder / "out" / "checkpoints" / f"step-{step:07d}"
    assert caught.value.path.is_dir()
    assert [r["step"] for r in read_metrics(folder / "out")][-1] == step  # the step was finished and no other started
    assert signal.getsignal(signal.SIGINT) == before
    train(config, resume=True, show_progress=False)
    assert_same_run(folder / "out", finished)


def test_an_interrupted_run_with_dropout_equals_an_uninterrupted_one(tmp_path, tokenizer_file, finished, monkeypatch):
    dropout = {"regularization": {"residual_dropout": 0.2}}
    whole = run(tmp_path / "whole" / "run", tokenizer_file, **dropout)
    assert read_metrics(whole)[0]["cross_entropy"] != read_metrics(finished)[0]["cross_entropy"]
    at_step(monkeypatch, loop, 5, interrupt)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts" / "run", tokenizer_file, **dropout)
    assert_same_run(run(tmp_path / "parts" / "run", tokenizer_file, resume=True), whole)


def test_sigterm_acts_as_an_interrupt(tmp_path, tokenizer_file, monkeypatch):
    at_step(monkeypatch, loop, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run(tmp_path, tokenizer_file)
    assert files(tmp_path / "out" / "checkpoints") == ["step-0000002"]


def test_an_interrupt_during_the_checkpoint_of_a_step_waits_for_the_next(tmp_path, tokenizer_file, monkeypatch):
    original, calls = state.save_state, iter([True])

    def save_state(*arguments):
        if next(calls, False):
            interrupt()
        return original(*arguments)

    monkeypatch.setattr(state, "save_state", save_state)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, tokenizer_file)
    assert caught.value.path.name == "step-0000004"


class Killed(BaseException):
    """Stands for a process that ends without time to react."""


def killed_at(step: int, folder: Path, monkeypatch) -> TrainConfig:
    """Train the run in `folder` until it is killed in a step; its configuration."""

    def kill() -> None:
        raise Killed

    config = load_config(folder / "run.toml")
    with monkeypatch.context() as patched:
        at_step(patched, loop, step, kill)
        with pytest.raises(Killed):
            train(config, show_progress=False)
    return config


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path, finished, monkeypatch):
    folder = copy_of(finished, tmp_path)
    config = killed_at(9, folder, monkeypatch)
    output = folder / "out"
    assert files(output / "checkpoints") == ["step-0000003", "step-0000006"]
    assert [r["step"] for r in read_metrics(output)][-1] == 8
    # A killed process cannot clean up: a partial checkpoint, a partial best, half a line of metrics.
    for name in ("checkpoints/.step-0000009.0123.partial", ".best.0123.partial"):
        shutil.copytree(output / "checkpoints" / "step-0000003", output / name)
        (output / name / "training_state.pt").unlink()
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write('{"step": 9, "cross_en')
    train(config, resume=True, show_progress=False)
    assert_same_run(output, finished)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, finished, monkeypatch):
    folder = copy_of(finished, tmp_path)
    config = killed_at(3, folder, monkeypatch)
    assert len(read_metrics(folder / "out")) == 2
    refused(lambda: train(config, resume=True, show_progress=False), ConfigError)
    train(config, show_progress=False)
    assert_same_run(folder / "out", finished)


def test_a_second_interrupt_stops_at_once_and_leaves_nothing_half_written(tmp_path, finished, monkeypatch):
    folder = copy_of(finished, tmp_path)
    config = load_config(folder / "run.toml")
    original = state.write_state

    def write(*arguments) -> None:
        original(*arguments)
        interrupt()

    with monkeypatch.context() as patched:
        at_step(patched, loop, 5, lambda: (interrupt(), patched.setattr(state, "write_state", write)))
        with pytest.raises(KeyboardInterrupt):
            train(config, show_progress=False)
    assert files(folder / "out" / "checkpoints") == ["step-0000003"]
    train(config, resume=True, show_progress=False)
    assert_same_run(folder / "out", finished)


def test_a_full_disk_costs_only_the_steps_since_the_last_checkpoint(tmp_path, finished, monkeypatch):
    folder = copy_of(finished, tmp_path)
    config = load_config(folder / "run.toml")
    original = state.write_state

    def write(saved, path) -> None:
        original(saved, path)
        if saved["progress"]["step"] == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(state, "write_state", write)
        assert "disk is full" in refused(lambda: train(config, show_progress=False), UserError)
    assert files(folder / "out" / "checkpoints") == ["step-0000003"]
    train(config, resume=True, show_progress=False)
    assert_same_run(folder / "out", finished)


def test_resuming_a_finished_run_changes_nothing(tmp_path, finished):
    folder = shutil.copytree(finished.parent, tmp_path / finished.parent.name)
    (folder / "out" / "evaluation.json").unlink()  # interrupted during the final evaluation
    train(load_config(folder / "run.toml"), resume=True, show_progress=False)
    assert_same_run(folder / "out", finished)
    assert read_metrics(folder / "out") == read_metrics(finished)


def test_threads_other_than_the_main_one_train_without_signals(tmp_path, tokenizer_file):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, tmp_path, tokenizer_file, schedule={"total_tokens": 64}, data={"valid": []}).result()
    assert (tmp_path / "out" / "best").is_dir()


# ---- what is refused ----


def test_an_existing_run_is_not_overwritten_nor_a_missing_one_resumed(finished, tmp_path, tokenizer_file):
    config = load_config(finished.parent / "run.toml")
    before = (finished / "metrics.jsonl").read_bytes()
    assert "--resume" in refused(lambda: train(config, show_progress=False), ConfigError)
    assert (finished / "metrics.jsonl").read_bytes() == before
    write_run(tmp_path, tokenizer_file)
    config = load_config(tmp_path / "run.toml")
    assert "without --resume" in refused(lambda: train(config, resume=True, show_progress=False), ConfigError)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": {"learning_rate": 2e-2}}, "learning_rate"),
        ({"schedule": {"total_tokens": 13 * 64}}, "total_tokens"),
        ({"data": {"train": [{"path": "train.txt"}]}}, "train"),
        ({"run": {"seed": 4}}, "seed"),
        ({"regularization": {"residual_dropout": 0.1}}, "residual_dropout"),
    ],
)
def test_resuming_with_a_changed_configuration_is_refused(finished, tmp_path, tokenizer_file, changes, told):
    folder = shutil.copytree(finished.parent, tmp_path / finished.parent.name)
    message = refused(lambda: run(folder, tokenizer_file, resume=True, **changes), ConfigError)
    assert told in message
    assert read_metrics(folder / "out") == read_metrics(finished)


def test_resuming_with_changed_texts_or_tokenizer_is_refused(finished, tmp_path, tokenizer_file):
    folder = shutil.copytree(finished.parent, tmp_path / finished.parent.name)
    (folder / "train.txt").write_text(text(24, seed=9), encoding="utf-8")
    message = refused(lambda: run(folder, tokenizer_file, resume=True), ConfigError)
    assert f"{folder.name}-train" in message
    other = tmp_path / "tokenizer.json"
    other.write_text(tokenizer_file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    folder = shutil.copytree(finished.parent, tmp_path / "again" / finished.parent.name)
    assert "tokenizer" in refused(lambda: run(folder, other, resume=True, run={}), ConfigError)


def test_resuming_with_a_longer_evaluation_is_allowed(finished, tmp_path, tokenizer_file):
    folder = shutil.copytree(finished.parent, tmp_path / finished.parent.name)
    run(folder, tokenizer_file, resume=True, evaluation={"windows": 0}, checkpoint={"keep": 1}, run={"threads": 2})


@pytest.mark.parametrize(
    ("rate", "tokens", "told"),
    [(9e18, 3 * 64, "gradient norm"), (9e18, 64, "held-out loss")],
)
def test_a_nonfinite_loss_ends_the_run_with_one_sentence(tmp_path, tokenizer_file, rate, tokens, told):
    schedule = {"total_tokens": tokens, "warmup_tokens": 0}
    message = refused(
        lambda: run(tmp_path, tokenizer_file, optimizer={"learning_rate": rate}, schedule=schedule), ConfigError
    )
    assert told in message
    assert "learning_rate" in message
    assert files(tmp_path / "out") == ["metrics.jsonl"]  # no NaN was saved
    assert all(math.isfinite(r["cross_entropy"]) for r in read_metrics(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokenizer": {"path": "none.json"}}, "none.json"),
        ({"tokenizer": {"vocab_size": 300}}, "300"),  # the file has 320
        ({"model": {"vocab_size": 310, "eos_token_id": 309}}, "320 ids"),
        ({"model": {"vocab_size": 400, "eos_token_id": 399}}, "399"),
        ({"model": {"hidden_act": "sine"}}, "sine"),
        ({"run": {"device": "tpu"}}, "tpu"),
        ({"run": {"threads": 0}}, "threads"),
        ({"data": {"train": [{"path": "none.txt"}]}}, "none.txt"),
        ({"data": {"measure": [{"path": "none.txt"}]}}, "none.txt"),
        ({"data": {"train": [{"path": "valid.txt", "repeat": 1e-6}]}}, "valid.npy"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_mistakes_are_found_before_the_first_step(tmp_path, tokenizer_file, changes, told):
    assert told in refused(lambda: run(tmp_path, tokenizer_file, **changes), UserError)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_metrics_of_equal_runs_differ_only_in_timings(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    train(load_config(folder / "run.toml"), show_progress=False)
    assert_same_run(folder / "out", finished)
    assert list(map(fixed, read_metrics(folder / "out"))) != read_metrics(folder / "out")


# ---- starting from a checkpoint ----


def test_a_run_starts_from_the_weights_of_a_checkpoint(tmp_path, finished, tokenizer_file):
    start = str(finished / "best")
    # A learning rate too small to change any weight: the output equals the start.
    output = run(
        tmp_path,
        tokenizer_file,
        run={"initialize_from": start},
        optimizer={"learning_rate": 1e-30},
        schedule={"total_tokens": 64, "warmup_tokens": 0},
    )
    before, after = checkpoint.load(start).state_dict(), checkpoint.load(output / "best").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_starting_from_a_checkpoint_of_other_shapes_is_refused(tmp_path, finished, tokenizer_file):
    changes = {"run": {"initialize_from": str(finished / "best")}, "model": {"num_experts": 8}}
    message = refused(lambda: run(tmp_path, tokenizer_file, **changes), ConfigError)
    assert "run.initialize_from" in message
    assert "[4, 16]" in message
    assert "[8, 16]" in message


def test_starting_from_a_packed_checkpoint_is_refused(tmp_path, tokenizer_file):
    start = str(packed_folder(tmp_path / "packed", "int8"))
    message = refused(lambda: run(tmp_path / "run", tokenizer_file, run={"initialize_from": start}), ConfigError)
    assert "is a packed checkpoint" in message
    assert start in message


def test_a_run_starts_from_the_shipped_model_by_its_name(tmp_path, finished, tokenizer_file, monkeypatch):
    monkeypatch.setitem(hub._SHIPPED_FOLDERS, hub.SHIPPED_NAME, finished / "best")
    path = write_run(tmp_path, tokenizer_file, run={"initialize_from": "OLMoE-tiny"})
    started, before = loop._start(load_config(path), resumed=False), checkpoint.load(finished / "best").state_dict()
    assert all(torch.equal(before[name], value) for name, value in started.state_dict().items())
