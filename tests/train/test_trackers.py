"""TensorBoard and Weights & Biases get what metrics.jsonl gets; wandb is not installed, so a stand-in replaces it."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest

import finetuning_runs
from olmoe.errors import ConfigError, UserError
from olmoe.train import loop, trackers
from olmoe.train.config import LogConfig, load_config
from olmoe.train.finetune.config import SFTConfig
from olmoe.train.finetune.config import load_config as load_finetuning
from olmoe.train.finetune.sft import sft
from olmoe.train.loop import Interrupted, train
from olmoe.train.trackers import scalars
from sentences import refused
from training_runs import read_metrics, write_run

# The part of wandb that a run uses; it logs each call to a file beside itself.
STAND_IN = """
import json, pathlib
NOTES = pathlib.Path(__file__).with_name("notes.jsonl")
def note(*what):
    with NOTES.open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step):
        note("log", step, values)
    def finish(self, exit_code):
        note("finish", exit_code)
def init(**settings):
    if settings["project"] == "refused":
        raise RuntimeError("api_key not configured (no-tty).\\nmore")
    note("init", settings)
    return Run()
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """The calls that the stand-in has logged so far."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield lambda: [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_fine_tuning_is_shown_too(tmp_path, tokenizer_file, notes):
    """There was no [log] for it."""
    pytest.importorskip("tensorboard")
    log = {"tensorboard": True, "wandb": "mine"}
    path = finetuning_runs.write_run(tmp_path, tokenizer_file, schedule={"epochs": 1}, log=log)
    sft(load_finetuning(path, SFTConfig), show_progress=False)
    shown = events(tmp_path / "out")
    records = read_metrics(tmp_path / "out")
    assert shown["loss"] == pytest.approx({r["step"]: r["loss"] for r in records if "loss" in r})
    (name,) = records[0]["held_out_loss"]
    assert shown[f"held_out_loss/{name}"].keys() == {r["step"] for r in records if "held_out_loss" in r}
    assert [kind for kind, *_ in notes()] == ["init", *["log"] * len(records), "finish"]
    sft(load_finetuning(path, SFTConfig), overwrite=True, show_progress=False)
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1


def events(output: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's values by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in found.Tags()["scalars"]}


def shown(output: Path) -> dict[str, dict[int, float]]:
    """The expected values: every number of metrics.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for record in read_metrics(output):
        for name, value in scalars(record).items():
            found.setdefault(name, {})[record["step"]] = value
    return found


def assert_shown(found: dict[str, dict[int, float]], output: Path) -> None:
    expected = shown(output)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name


def interrupted_at(monkeypatch, step: int, config) -> None:
    """Train, and interrupt the run in a given step."""
    original = loop.advance

    def advance(run):
        if run.progress.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return original(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", advance)
        with pytest.raises(Interrupted):
            train(config, show_progress=False)


def test_every_number_has_its_own_name():
    record = {
        "step": 7, "tokens": 70, "cross_entropy": 2.5, "grad_norm": None, "router_z": float("nan"),
        "dead_experts": [1, 0], "router_margin": [0.5, None], "expert_load": [[6, 2], [4, 4]],
        "held_out_loss": {"books": 3.0}, "bits_per_byte": {"books": None},
    }  # fmt: skip
    assert scalars(record) == {
        "cross_entropy": 2.5, "dead_experts/layer-0": 1, "dead_experts/layer-1": 0, "router_margin/layer-0": 0.5,
        "expert_load_max_over_mean/layer-0": 1.5, "expert_load_max_over_mean/layer-1": 1.0, "held_out_loss/books": 3.0,
    }  # fmt: skip
    assert sorted(scalars({"dead_experts": [0] * 16}))[:2] == ["dead_experts/layer-00", "dead_experts/layer-01"]


def test_tensorboard_shows_all_numbers_of_a_resumed_run(tmp_path, tokenizer_file, monkeypatch):
    pytest.importorskip("tensorboard")
    path = write_run(tmp_path / "run", tokenizer_file, log={"tensorboard": True})
    output = path.parent / "out"
    interrupted_at(monkeypatch, 5, load_config(path))
    # Killed later: steps after the checkpoint are computed again.
    (path.parent / "out" / "metrics.jsonl").open("a").write('{"step": 6, "tokens": 384, "cross_entropy": 99.0}\n')
    writer = trackers._TensorBoard(output, 5)
    writer.write(6, {"cross_entropy": 99.0})
    writer.close(failed=True)
    train(load_config(path), resume=True, show_progress=False)
    assert_shown(events(output), output)
    train(load_config(path), overwrite=True, show_progress=False)
    assert len(list((output / "tensorboard").iterdir())) == 1  # the older files are gone
    assert_shown(events(output), output)


def test_weights_and_biases_gets_all_numbers_and_one_run_for_a_resumed_one(
    tmp_path, tokenizer_file, monkeypatch, notes
):
    path = write_run(tmp_path / "run", tokenizer_file, log={"wandb": "mixtures"})
    output = path.parent / "out"
    interrupted_at(monkeypatch, 5, load_config(path))
    train(load_config(path), resume=True, show_progress=False)
    started = [settings for kind, settings in (note for note in notes() if note[0] == "init")]
    assert [s["project"] for s in started] == ["mixtures"] * 2
    assert started[0]["id"] == started[1]["id"] != ""
    assert started[0]["resume"] == "allow"
    assert started[0]["dir"] == str(output)
    assert started[0]["config"]["optimizer"]["learning_rate"] == 1e-2
    assert [note[1] for note in notes() if note[0] == "finish"] == [1, 0]
    found: dict[str, dict[int, float]] = {}
    for _, step, values in (note for note in notes() if note[0] == "log"):
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    assert_shown(found, output)
    train(load_config(path), overwrite=True, show_progress=False)
    assert [n[1] for n in notes() if n[0] == "init"][-1]["id"] != started[0]["id"]


def test_a_tracker_that_fails_to_start_is_reported_in_one_sentence(tmp_path, tokenizer_file, notes):
    path = write_run(tmp_path / "run", tokenizer_file, log={"wandb": "refused"})
    told = refused(lambda: train(load_config(path), show_progress=False), UserError)
    assert told == (
        "Weights & Biases does not start (api_key not configured (no-tty)); log in with `wandb login`, set "
        "WANDB_MODE=offline, or leave log.wandb out."
    )


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb", "mixtures")])
def test_a_missing_tracker_is_refused_before_any_work(tmp_path, tokenizer_file, monkeypatch, key, value):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = write_run(tmp_path / "run", tokenizer_file, log={key: value})
    told = refused(lambda: train(load_config(path), show_progress=False), ConfigError)
    assert told == f"log.{key} needs the package {key}; pip install {key}, or leave the key out."
    assert not (path.parent / "tokens").exists()
    trackers.check_installed(LogConfig())
