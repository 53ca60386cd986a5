"""`olmoe plot`: a run's folder goes in, a page comes out, also while the run goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import time

import pytest

pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

from olmoe.cli.main import main
from run_records import record, write_records


def told(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return err.removeprefix("olmoe: ").strip()


def test_a_page_is_written_where_it_is_asked_for(tmp_path, capsys):
    folder = write_records(tmp_path, steps=12)
    assert main(["plot", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'training.html'}\n"
    assert f"Training of {tmp_path.name}" in (folder / "training.html").read_text()
    assert main(["plot", str(folder / "metrics.jsonl"), "--output", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "page.html").read_text() == (folder / "training.html").read_text()


def test_a_run_is_followed_until_it_has_ended(tmp_path, monkeypatch):
    pages, page = [], tmp_path / "training.html"

    def sleep(seconds):
        """The run goes on meanwhile: it begins, makes a step, and ends with another one."""
        pages.append(page.read_text() if page.exists() else None)
        if len(pages) == 1:
            write_records(tmp_path, steps=1)
            return
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record(len(pages))) + "\n")
        if len(pages) == 3:
            (tmp_path / "evaluation.json").write_text("{}")

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["plot", str(tmp_path), "--follow", "5"]) == 0
    pages.append(page.read_text())
    assert pages[0] is None
    assert ["http-equiv" in text for text in pages[1:]] == [True, True, False]
    assert [f"{step} steps," in text for step, text in enumerate(pages[1:], 1)] == [True] * 3


def test_an_older_evaluation_is_no_end(tmp_path, monkeypatch):
    """Of a run that was finished, and goes on with more tokens."""
    write_records(tmp_path, steps=3)
    (tmp_path / "evaluation.json").write_text("{}")
    os.utime(tmp_path / "evaluation.json", (1, 1))

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["plot", str(tmp_path), "--follow"]) == 130


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    assert main(["plot", str(tmp_path / "none")]) == 2
    assert "cannot be read" in told(capsys)
    folder = write_records(tmp_path, steps=2)
    assert main(["plot", str(folder), "--follow", "0.1"]) == 2
    assert told(capsys) == "--follow takes at least 1 second, not 0.1."
    for output in (tmp_path, tmp_path / "none" / "page.html"):
        assert main(["plot", str(folder), "--output", str(output)]) == 2
        assert "name a file in a folder that exists" in told(capsys)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plot", str(folder)]) == 2
    assert told(capsys) == ("The figures of a report need matplotlib, which is not installed; install olmoe[analysis].")
