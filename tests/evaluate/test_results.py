"""Results as files and as a table."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")

from olmoe.errors import UserError
from olmoe.evaluate import results

FOUND = {
    "results": {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 2}},
    "versions": {"a": 1.0},
    "n-shot": {"a": 0},
    "higher_is_better": {"a": {"acc": True}},
    "group_subtasks": {"a": []},
    "config": {"numpy": np.float32(1.5), "model_dtype": np.dtype("float32")},
    "samples": {"a/b": [{"doc_id": 0, "resps": [[(-1.5, True)]]}, {"doc_id": 1, "text": "é"}]},
}


def test_files_and_samples(tmp_path):
    files = results.write(FOUND, tmp_path / "new" / "scores.json", overwrite=False)
    assert [file.name for file in files] == ["scores.samples.a_b.jsonl", "scores.json"]
    found = json.loads(files[-1].read_text("utf-8"))
    assert found["results"] == FOUND["results"]
    assert found["config"] == {"numpy": 1.5, "model_dtype": "float32"}
    assert "samples" not in found
    lines = [json.loads(line) for line in files[0].read_text("utf-8").splitlines()]
    assert lines == [{"doc_id": 0, "resps": [[[-1.5, True]]]}, {"doc_id": 1, "text": "é"}]


def test_nothing_is_replaced_unasked(tmp_path):
    (tmp_path / "scores.json").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        results.check(tmp_path / "scores.json", overwrite=False)
    results.check(tmp_path / "scores.json", overwrite=True)
    (tmp_path / "other.samples.a_b.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"other.samples.a_b.jsonl exists already"):
        results.write(FOUND, tmp_path / "other.json", overwrite=False)
    assert not (tmp_path / "other.json").exists()
    with pytest.raises(UserError, match="cannot be written"):
        results.check(tmp_path / "scores.json" / "below", overwrite=False)


def test_the_table_is_the_harness_own():
    header, _, row = results.table(FOUND).splitlines()
    assert [cell.strip() for cell in header.split("|")][1:5] == ["Tasks", "Version", "Filter", "n-shot"]
    assert row == "|a    |      1|none  |     0|acc   |↑  |  0.5|±  |   0.1|"
    grouped = FOUND | {"groups": FOUND["results"]}
    assert results.table(grouped).count("0.5") == 2
    assert "|Groups|" in results.table(grouped)
