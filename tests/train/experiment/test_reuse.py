"""Runs that several experiments share."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from olmoe.train.config import load_config
from olmoe.train.experiment.definition import load_experiment
from olmoe.train.experiment.results import collect
from olmoe.train.experiment.reuse import reuse
from olmoe.train.experiment.runs import lay_out, write_configuration
from olmoe.train.experiment.schedule import train_all
from olmoe.train.loop import train
from small_experiments import DENSE, write_experiment


@pytest.fixture
def trained(tmp_path, tokenizer_file):
    """The folder of all experiments, in which one experiment's dense arm is trained; and that run."""
    path = write_experiment(tmp_path / "files", tokenizer_file)
    run = lay_out(load_experiment(path), tmp_path / "runs" / "first", seeds=1)[0]
    write_configuration(run)
    train(run.config, show_progress=False)
    return tmp_path / "runs", run


def laid_out(output, tokenizer_file, arms, **changes):
    """The runs of another experiment whose files lie elsewhere, with their configurations written."""
    path = write_experiment(output.parents[1] / "other", tokenizer_file, arms, **changes)
    runs = lay_out(load_experiment(path), output, seeds=1)
    for run in runs:
        write_configuration(run)
    return runs


def test_runs_of_another_experiment_are_reused(trained, tokenizer_file):
    folder, first = trained
    # The same settings written differently: `weight_decay` is the default, paths differ, an arm has another name.
    arms = {"none": {"model": DENSE, "optimizer": {"weight_decay": 0.1}}, "sparse": {}}
    dense, sparse = laid_out(folder / "second", tokenizer_file, arms, checkpoint={"keep": 1})
    assert (reuse(dense), reuse(sparse)) == (True, False)
    assert dense.is_finished
    assert not sparse.is_finished
    assert not reuse(dense)  # once
    for name in ("metrics.jsonl", "evaluation.json", "best/model.safetensors", "best/tokenizer.json"):
        assert (dense.folder / name).read_bytes() == (first.folder / name).read_bytes()
    experiment = load_experiment(folder.parent / "other" / "small.toml")
    arm = collect(experiment, [dense])["arms"]["none"]
    assert arm["runs"]["1"]["reused_from"] == "first/dense/seed-1"
    assert arm["loss"]["mean"] == pytest.approx(
        next(iter(json.loads((first.folder / "evaluation.json").read_text())["held_out_loss"].values()))
    )


def test_only_missing_runs_are_trained_and_may_start_from_reused_ones(trained, tokenizer_file):
    folder, _ = trained
    arms = {"half": {"model": DENSE}, "on": {"start": "half"}, "sparse": {}}
    half, on, sparse = laid_out(folder / "second", tokenizer_file, arms)
    train_all([half, on, sparse])
    assert (half.folder / "reused.json").is_file()
    assert not (half.folder / "log.txt").exists()  # not trained again
    assert all(run.is_finished and not (run.folder / "reused.json").exists() for run in (on, sparse))
    assert (half.folder / "best" / "model.safetensors").read_bytes() != (
        on.folder / "best" / "model.safetensors"
    ).read_bytes()
    # A run that starts from another one is trained unless both are known to start from the same weights.
    again = laid_out(folder / "third", tokenizer_file, arms)
    assert [reuse(run) for run in again] == [True, False, True]
    assert json.loads((again[0].folder / "reused.json").read_text())["from"] == "first/dense/seed-1"


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"learning_rate": 2e-2}},
        {"loss": {"router_z": 0.1}},
        {"batch": {"sequences": 1, "accumulation": 4}},  # the same step, but load balancing sees fewer tokens at a time
        {"evaluation": {"windows": 2}},
        {"skip": {"sigmas": 0}},
        {"schedule": {"warmup_tokens": 64}},
        {"shared_expert": {"width": 8}},
    ],
    ids=lambda changes: "-".join(f"{section}.{key}" for section, table in changes.items() for key in table),
)
def test_runs_with_other_settings_are_not_reused(trained, tokenizer_file, changes):
    folder, _ = trained
    dense, _ = laid_out(folder / "second", tokenizer_file, None, **changes)
    assert not reuse(dense)
    assert list(dense.folder.iterdir()) == [dense.folder / "run.toml"]


def test_runs_on_other_texts_are_not_reused(trained, tokenizer_file):
    folder, _ = trained
    dense, _ = laid_out(folder / "second", tokenizer_file, None)
    text = folder.parent / "other" / "train.txt"
    text.write_text(text.read_text(encoding="utf-8") + "the end.\n", encoding="utf-8")
    assert not reuse(dense)


def test_runs_of_another_seed_unfinished_or_damaged_are_not_reused(trained, tokenizer_file):
    folder, first = trained
    path = write_experiment(folder.parent / "other", tokenizer_file)
    second = lay_out(load_experiment(path), folder / "second", seeds=2)[2]
    write_configuration(second)
    shutil.copytree(first.folder, folder / "first" / "dense" / "seed-2")  # its run.toml says seed 1
    assert not reuse(second)
    run = lay_out(load_experiment(path), folder / "second", seeds=1)[0]
    write_configuration(run)
    (state,) = first.folder.glob("checkpoints/step-0000012/training_state.pt")
    saved = torch.load(state, weights_only=True)
    state.write_bytes(b"nothing")
    assert not reuse(run)
    torch.save(saved, state)
    (first.folder / "evaluation.json").rename(first.folder / "elsewhere.json")
    assert not reuse(run)
    (first.folder / "elsewhere.json").rename(first.folder / "evaluation.json")
    assert reuse(run)


def test_a_run_already_begun_is_continued_not_replaced(trained, tokenizer_file):
    folder, _ = trained
    dense, _ = laid_out(folder / "second", tokenizer_file, None)
    (dense.folder / "checkpoints" / "step-0000003").mkdir(parents=True)
    assert not reuse(dense)
    assert load_config(dense.folder / "run.toml").run.seed == 1
