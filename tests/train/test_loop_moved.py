"""Runs whose folder was renamed, copied or lost its best checkpoint, and shell-style paths."""

from __future__ import annotations

import os
import shutil

import pytest

from olmoe.errors import ConfigError
from olmoe.train import loop
from olmoe.train.config import load_config
from olmoe.train.loop import Interrupted, train
from olmoe.train.toml_file import resolve_path
from sentences import refused
from training_runs import assert_same_run, text, write_run

MEASURE = {"data": {"measure": [{"path": "more.txt"}]}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("finished")
    start(folder, tokenizer_file)
    train(load_config(folder / "run.toml"), show_progress=False)
    return folder


def start(folder, tokenizer_file):
    path = write_run(folder, tokenizer_file, **MEASURE)
    (folder / "more.txt").write_text(text(8, seed=2), encoding="utf-8")
    return path


def interrupted(folder, tokenizer_file, name, monkeypatch):
    """A run in a folder of this name, interrupted in its sixth step."""
    path = start(folder / name, tokenizer_file)
    original, calls = loop.clip_gradients, iter(range(1, 100))

    def clip(*arguments):
        if next(calls) == 6:
            raise RuntimeError("killed")
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "clip_gradients", clip)
        with pytest.raises((RuntimeError, Interrupted), match="killed"):
            train(load_config(path), show_progress=False)
    return folder / name


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
@pytest.mark.parametrize("tokens", [True, False], ids=["with tokens", "without"])
def test_a_run_resumes_in_a_renamed_folder(finished, tmp_path, tokenizer_file, monkeypatch, move, tokens):
    folder = interrupted(tmp_path, tokenizer_file, finished.name, monkeypatch)
    move(folder, tmp_path / "elsewhere" / "renamed")
    if not tokens:
        shutil.rmtree(tmp_path / "elsewhere" / "renamed" / "tokens")
    train(load_config(tmp_path / "elsewhere" / "renamed" / "run.toml"), resume=True, show_progress=False)
    assert_same_run(tmp_path / "elsewhere" / "renamed" / "out", finished / "out")


def test_a_run_resumes_with_its_texts_moved(finished, tmp_path, tokenizer_file, monkeypatch):
    folder = interrupted(tmp_path, tokenizer_file, finished.name, monkeypatch)
    (folder / "texts").mkdir()
    for name in ("train.txt", "valid.txt"):
        (folder / name).rename(folder / "texts" / name)
    data = {"train": [{"path": "texts/train.txt", "repeat": 1.5}], "valid": [{"path": "texts/valid.txt"}]}
    write_run(folder, tokenizer_file, data=data | MEASURE["data"] | {"tokens_folder": "new"})
    for name in ("train.txt", "valid.txt"):
        (folder / name).unlink()
    train(load_config(folder / "run.toml"), resume=True, show_progress=False)
    assert_same_run(folder / "out", finished / "out")


def test_a_missing_best_checkpoint_is_rebuilt_without_the_hub(finished, tmp_path, tokenizer_file, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    folder = interrupted(tmp_path, tokenizer_file, finished.name, monkeypatch)
    shutil.rmtree(folder / "out" / "best")
    train(load_config(folder / "run.toml"), resume=True, show_progress=False)
    assert "best is missing" in caplog.text
    assert_same_run(folder / "out", finished / "out")  # the best of this run is its last

    done = shutil.copytree(finished, tmp_path / "done")
    shutil.rmtree(done / "out" / "best")
    caplog.clear()
    train(load_config(done / "run.toml"), resume=True, show_progress=False)
    (told,) = [message for message in caplog.messages if "best is missing" in message]  # was told twice
    assert "the last state takes its place" in told
    for part in ("best", "checkpoints/step-0000012"):
        assert (done / "out" / part / "model.safetensors").read_bytes() == (
            finished / "out" / "best" / "model.safetensors"
        ).read_bytes()


# ---- paths ----


def test_paths_are_expanded_like_a_shells(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    base = tmp_path / "base"
    assert resolve_path("~/a", base) == tmp_path / "home" / "a"
    assert resolve_path("$SCRATCH/a", base) == resolve_path("${SCRATCH}/a", base) == tmp_path / "scratch" / "a"
    assert resolve_path("a~b/c$", base) == base / "a~b/c$"
    changes = {
        "run": {"output": "$SCRATCH/run"},
        "data": {"train": [{"path": "~/train.txt"}], "tokens_folder": "${SCRATCH}/tokens"},
    }
    path = write_run(base, tokenizer_file, **changes)
    (tmp_path / "home").mkdir()
    (base / "train.txt").rename(tmp_path / "home" / "train.txt")
    assert train(load_config(path), show_progress=False) == tmp_path / "scratch" / "run" / "best"
    assert sorted(os.listdir(base)) == ["run.toml", "valid.txt"]


@pytest.mark.parametrize("place", ["$NOWHERE/run", "${NOWHERE}", "a/$NOWHERE", "~nobody-of-this-name/run"])
@pytest.mark.parametrize("key", ["output", "tokens_folder", "train"])
def test_unset_variables_in_paths_are_refused(place, key, tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    changes = {
        "output": {"run": {"output": place}},
        "tokens_folder": {"data": {"tokens_folder": place}},
        "train": {"data": {"train": [{"path": place}]}},
    }[key]
    path = write_run(tmp_path, tokenizer_file, **changes)
    message = refused(lambda: load_config(path), ConfigError)
    assert "is not defined here" in message
    assert repr(place) in message
    (tmp_path / "$odd").mkdir()  # an existing folder is taken literally
    assert resolve_path("$odd", tmp_path) == tmp_path / "$odd"
