"""What a run records about its speed and its routers."""

from __future__ import annotations

import json

import pytest

from olmoe.train.config import load_config
from olmoe.train.evaluation import evaluate_all
from olmoe.train.loop import train
from olmoe.train.run_data import open_data
from olmoe.train.throughput import flops_per_token
from olmoe.weights import checkpoint
from sentences import refused
from training_runs import read_metrics, write_run


def test_every_step_records_speed_memory_and_margins(tmp_path, tokenizer_file):
    path = write_run(tmp_path / "run", tokenizer_file, run={"peak_flops": 2e10})
    train(load_config(path), show_progress=False)
    steps = [record for record in read_metrics(path.parent / "out") if "cross_entropy" in record]
    assert len(steps) == 12
    per_token = flops_per_token(load_config(path).model)
    for record in steps:
        assert record["peak_flops"] == 2e10
        assert record["mfu"] == pytest.approx(per_token * record["tokens_per_second"] / 2e10)
        assert record["peak_memory_bytes"] > 2**26
        for name in ("router_margin", "router_cutoff_margin"):
            assert len(record[name]) == 2  # layers
            assert all(0 <= margin < 1 for margin in record[name])
    assert steps[0]["router_margin"] != steps[-1]["router_margin"]


def test_an_invalid_peak_rate_is_refused(tmp_path, tokenizer_file):
    path = write_run(tmp_path / "run", tokenizer_file, run={"peak_flops": 0})
    assert refused(lambda: load_config(path)) == "run.peak_flops must be above 0 and below 2^63, not 0.0."


def test_the_final_evaluation_can_be_limited_to_some_windows(tmp_path, tokenizer_file):
    path = write_run(tmp_path / "run", tokenizer_file, evaluation={"windows": 2, "final_windows": 5})
    best = train(load_config(path), show_progress=False)
    config, data = open_data(load_config(path), [])
    (expected,) = evaluate_all(checkpoint.load(best), data.held_out, 16, 5).values()
    assert expected.tokens == 5 * 16
    report = json.loads((path.parent / "out" / "evaluation.json").read_text(encoding="utf-8"))
    (loss,) = report["held_out_loss"].values()
    assert loss == pytest.approx(expected.loss, abs=1e-4)
    (load,) = report["expert_load_LE"].values()
    assert load == expected.counts_LE.tolist()
    assert config.evaluation.final_windows == 5
