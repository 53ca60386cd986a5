"""Runs with document masks and without repetitive windows: trained, evaluated and resumed exactly."""

from __future__ import annotations

import json
import signal

import pytest

from configurations import VOCAB_SIZE
from olmoe.errors import ConfigError
from olmoe.train import loop
from olmoe.train.config import load_config
from olmoe.train.data import open_tokens, prepare
from olmoe.train.evaluation import evaluate
from olmoe.train.loop import Interrupted, train
from olmoe.weights import checkpoint
from sentences import refused
from training_runs import assert_same_run, read_metrics, text, write_run

MASKED = {"document_mask": True, "mask_repetitions": 3, "train": [{"path": "train.txt", "weight": 2.0}]}


def prepared(folder, tokenizer_file, data):
    """A run on documents shorter than a window, some of them repetitive."""
    path = write_run(folder, tokenizer_file, data=data)
    short = "\n".join(f"{line}\n<|endoftext|>" for line in text(8, seed=4).split("\n") if line[:1].isalpha())
    (folder / "train.txt").write_text(f"{text(16)}{short}\n{'a dog ' * 40}\n<|endoftext|>\n", encoding="utf-8")
    (folder / "valid.txt").write_text(short, encoding="utf-8")
    return path


def test_a_masked_run_resumes_exactly_and_is_evaluated_with_its_mask(tmp_path, tokenizer_file, monkeypatch):
    whole = prepared(tmp_path / "run", tokenizer_file, MASKED)
    train(load_config(whole), show_progress=False)
    (tmp_path / "other").mkdir()
    path = prepared(tmp_path / "other" / "run", tokenizer_file, MASKED)
    original = loop.advance

    def advance(run):
        if run.progress.step == 6:
            signal.raise_signal(signal.SIGINT)
        return original(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", advance)
        with pytest.raises(Interrupted):
            train(load_config(path), show_progress=False)
    train(load_config(path), resume=True, show_progress=False)
    assert_same_run(path.parent / "out", whole.parent / "out")
    file = prepare(whole.parent / "valid.txt", tokenizer_file, whole.parent / "tokens", VOCAB_SIZE - 1)
    model, tokens = checkpoint.load(whole.parent / "out" / "best"), open_tokens(file, VOCAB_SIZE)
    said = json.loads((whole.parent / "out" / "evaluation.json").read_text())
    (loss,) = said["held_out_loss"].values()
    masked = evaluate(model, file, tokens, 16, eos_id=VOCAB_SIZE - 1)
    assert loss == pytest.approx(masked.loss, abs=1e-5)
    assert abs(evaluate(model, file, tokens, 16).loss - loss) > 1e-4


def test_each_option_changes_the_run_and_its_fingerprint(tmp_path, tokenizer_file):
    losses = {}
    for name, data in (("plain", {}), ("mask", {"document_mask": True}), ("filter", {"mask_repetitions": 3})):
        path = prepared(tmp_path / name / "run", tokenizer_file, data)
        train(load_config(path), show_progress=False)
        records = read_metrics(path.parent / "out")
        losses[name] = [record["cross_entropy"] for record in records if "cross_entropy" in record]
    assert losses["plain"] != losses["mask"]
    assert losses["plain"] != losses["filter"]
    path = prepared(tmp_path / "mask" / "run", tokenizer_file, {})
    told = refused(lambda: train(load_config(path), resume=True, show_progress=False), ConfigError)
    assert "[data] document_mask changed from True to None" in told


def test_runs_of_older_versions_resume(tmp_path, tokenizer_file):
    """They knew none of these options, so a run without them must look like theirs."""
    data = load_config(write_run(tmp_path, tokenizer_file)).fingerprint()["data"]
    assert set(data) == {"train", "valid", "measure", "sequence_length", "tokens_folder"}
    assert set(data["train"][0]) == {"path", "repeat"}
