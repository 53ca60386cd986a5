"""`olmoe sft`: a run from a configuration, its mistakes, and how an interrupted one goes on."""

from __future__ import annotations

import re
import signal

import pytest
import torch

from finetuning_runs import write_run
from olmoe.cli.main import EXIT_INTERRUPTED, EXIT_USER_ERROR, main
from olmoe.train.finetune import loop


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
    torch.set_num_threads(before)


def test_a_run_prints_its_best_checkpoint_and_chat_answers_with_it(tmp_path, tokenizer_file, capsys, monkeypatch):
    path = write_run(tmp_path, tokenizer_file, schedule={"epochs": 1})
    original = loop.clip_gradients
    monkeypatch.setattr(loop, "clip_gradients", lambda *a: (signal.raise_signal(signal.SIGINT), original(*a))[1])
    assert main(["sft", str(path), "--quiet"]) == EXIT_INTERRUPTED
    assert f"Continue with: olmoe sft {path} --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["sft", str(path), "--quiet"]) == EXIT_USER_ERROR
    assert "continue it with --resume" in capsys.readouterr().err
    assert main(["sft", str(path), "--quiet", "--resume"]) == 0
    best = capsys.readouterr().out.strip()
    assert best == str(tmp_path / "out" / "best")
    assert main(["generate", "a dog", "--model", best, "--max-new-tokens", "2", "--quiet"]) == 0
    assert main(["sft", str(path), "--overwrite"]) == 0
    assert re.search(r"held_out=\d\.\d{3}", capsys.readouterr().err)  # what the last evaluation measured


def test_mistakes_are_one_sentence(tmp_path, capsys):
    assert main(["sft", str(tmp_path / "none.toml")]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"olmoe: There is no training configuration {tmp_path / 'none.toml'}.\n"
