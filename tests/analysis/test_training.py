"""Loads of experts during training, from the records of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from olmoe.analysis import metrics
from olmoe.analysis.training import read_curves, read_load
from run_records import write_records
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


# ---- curves ----


def test_each_step_is_a_column_of_a_short_run(tmp_path):
    found = read_curves(write_records(tmp_path, steps=30))
    assert found.stride == 1
    assert found.steps.tolist() == list(range(1, 31))
    assert found.tokens.tolist() == [64 * step for step in range(1, 31)]
    for values in (found.mean, found.low, found.high):
        assert values["cross_entropy"].tolist() == pytest.approx([3.0 - 0.03 * step for step in range(1, 31)])
    assert found.by_layer["router_cutoff_margin"][6].tolist() == pytest.approx([0.02, 0.07])
    assert found.load[2].tolist() == [[64, 61, 3, 0], [32, 35, 29, 32]]
    assert found.held_out == {"books": [(640, 2.0, 1.0), (1280, 1.5, 0.75), (1920, 1 + 1 / 3, (1 + 1 / 3) / 2)]}


@pytest.mark.parametrize("most", [2, 4, 8, 10])
def test_a_long_run_has_columns_of_several_steps(tmp_path, most):
    whole = read_curves(write_records(tmp_path, steps=31))
    found = read_curves(tmp_path, most)
    stride = found.stride
    assert most / 2 < len(found.steps) <= most
    starts = range(0, 31, stride)
    assert found.steps.tolist() == [min(start + stride, 31) for start in starts]
    norms = [whole.mean["grad_norm"][start : start + stride] for start in starts]
    for values, of in ((found.mean, np.mean), (found.low, np.min), (found.high, np.max)):
        assert values["grad_norm"].tolist() == pytest.approx([of(part) for part in norms])
    margins = [whole.by_layer["router_cutoff_margin"][start : start + stride].mean(axis=0) for start in starts]
    np.testing.assert_allclose(found.by_layer["router_cutoff_margin"], margins)
    np.testing.assert_array_equal(found.load, [whole.load[start : start + stride].sum(axis=0) for start in starts])


def test_what_a_step_does_not_know_is_left_out_of_means(tmp_path):
    lines = [
        {"step": 1, "tokens": 4, "learning_rate": 1.0, "cross_entropy": None, "grad_norm": None, "skipped": True},
        {"step": 2, "tokens": 8, "learning_rate": 1.0, "cross_entropy": 3.0, "grad_norm": None},
        {"step": 3, "tokens": 12, "learning_rate": 1.0, "cross_entropy": 5.0, "router_margin": [0.5, None]},
        {"step": 3, "tokens": 12, "held_out_loss": {"a": 2.0}, "bits_per_byte": {"a": None}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = read_curves(tmp_path, most=2)
    assert found.mean["cross_entropy"].tolist() == [3.0, 5.0]
    assert set(found.mean) == {"learning_rate", "cross_entropy"}
    np.testing.assert_array_equal(found.by_layer["router_margin"], [[np.nan, np.nan], [0.5, np.nan]])
    assert found.load is None
    assert found.skipped == [1]
    assert found.held_out["a"][0][:2] == (12, 2.0)
    assert np.isnan(found.held_out["a"][0][2])


def test_curves_of_what_is_no_run_are_refused(tmp_path):
    assert "cannot be read" in refused(lambda: read_curves(tmp_path))
    path = tmp_path / "metrics.jsonl"
    for content, sentence in (
        ("", "no training step yet"),
        ('{"step": 1', "no training step yet"),
        ("x\n", "does not"),
    ):
        path.write_text(content, encoding="utf-8")
        assert sentence in refused(lambda: read_curves(tmp_path))
