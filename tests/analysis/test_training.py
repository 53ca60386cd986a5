"""Loads of experts during training, from the records of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from olmoe.analysis import metrics
from olmoe.analysis.training import read_load
from sentences import refused


@pytest.fixture
def run(tmp_path):
    records = []
    for step in range(1, 5):
        load = [[step, 8 - step, 0], [4, 4, 0]]
        records.append({"step": step, "tokens": 4 * step, "cross_entropy": 1.0, "expert_load": load})
        records.append({"step": step, "tokens": 4 * step, "held_out_loss": {"a": 2.0}})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "tok', encoding="utf-8")
    return tmp_path


def test_loads_by_step(run):
    found = read_load(run)
    assert found.steps.tolist() == [1, 2, 3, 4]
    assert found.tokens.tolist() == [4, 8, 12, 16]
    assert found.counts.shape == (4, 2, 3)
    assert found.counts[2].tolist() == [[3, 5, 0], [4, 4, 0]]
    assert metrics.balance(found.counts.sum(axis=0)).dead.tolist() == [1, 1]
    fewer = read_load(run / "metrics.jsonl", every=2)
    assert fewer.steps.tolist() == [2, 4]
    np.testing.assert_array_equal(fewer.counts, found.counts[1::2])


def test_what_holds_no_loads_is_named(tmp_path):
    assert "cannot be read" in refused(lambda: read_load(tmp_path))
    path = tmp_path / "metrics.jsonl"
    for content, sentence in (("{}\n", "no step with the load"), ("text\n", "does not hold"), ("[]\n", "no step")):
        path.write_text(content, encoding="utf-8")
        assert sentence in refused(lambda: read_load(tmp_path))
    path.write_text('{"expert_load": [[1]], "step": 1}\n', encoding="utf-8")
    assert "does not hold" in refused(lambda: read_load(tmp_path))
