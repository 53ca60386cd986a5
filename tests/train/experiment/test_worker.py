"""The process that trains one run: exit codes, resuming, and what happens when its input closes."""

from __future__ import annotations

import os

import pytest

from olmoe.train.experiment import worker
from olmoe.train.loop import Interrupted
from training_runs import assert_same_run, write_run

to_the_end_of_the_input = worker._interrupt_at_the_end_of_input


@pytest.fixture(autouse=True)
def _open_input(monkeypatch):
    """The test process's own stdin may be closed."""
    monkeypatch.setattr(worker, "_interrupt_at_the_end_of_input", lambda: None)


def test_a_run_cut_short_before_its_first_checkpoint_starts_over(tmp_path, tokenizer_file):
    path = write_run(tmp_path / "a" / "same", tokenizer_file)
    assert worker.main(str(path)) == 0
    other = write_run(tmp_path / "b" / "same", tokenizer_file)
    left = other.parent / "out"
    left.mkdir()
    (left / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "cross_entropy": 5.5}\n{"st', encoding="utf-8")
    assert worker.main(str(other)) == 0
    assert_same_run(left, path.parent / "out")


def test_mistakes_are_reported_in_one_sentence(tmp_path, tokenizer_file, capsys):
    path = write_run(tmp_path, tokenizer_file, model={"hiden_size": 8})
    assert worker.main(str(path)) == 2
    assert capsys.readouterr().err.startswith("olmoe: [model] has the unknown key 'hiden_size'")


def test_an_interrupt_exits_with_130(tmp_path, tokenizer_file, monkeypatch):
    from olmoe.train import loop

    def stop(*_, **__):
        raise Interrupted(tmp_path)

    monkeypatch.setattr(loop, "train", stop)
    assert worker.main(str(write_run(tmp_path, tokenizer_file))) == 130


def test_closing_stdin_interrupts_the_run(monkeypatch):
    read, write = os.pipe()
    os.write(write, b"more")
    os.close(write)
    told = []
    monkeypatch.setattr(worker._thread, "interrupt_main", lambda: told.append(os.read(read, 1)))
    to_the_end_of_the_input(read)
    os.close(read)
    assert told == [b""]
