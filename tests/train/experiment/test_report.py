"""The files that a finished experiment writes."""

from __future__ import annotations

import json

import pytest

from olmoe.errors import UserError
from olmoe.train.experiment.definition import load_experiment
from olmoe.train.experiment.report import write_report
from olmoe.train.experiment.runs import lay_out, write_configuration
from olmoe.train.loop import train
from small_experiments import write_experiment

pytest.importorskip("matplotlib")


def test_results_table_and_figure_of_real_runs(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    runs = lay_out(experiment, tmp_path / "out", seeds=2)
    with pytest.raises(UserError, match="is finished"):
        write_report(experiment, runs, tmp_path / "out")
    for run in runs:
        write_configuration(run)
        train(run.config, show_progress=False)
    text = write_report(experiment, runs, tmp_path / "out")
    assert text == (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for run in runs:
        found = results["arms"][run.arm.name]["runs"][str(run.seed)]
        evaluation = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
        assert [found["loss"]] == list(evaluation["held_out_loss"].values())
        assert [tokens for tokens, _ in found["curve"]] == [256, 512, 768]
        assert found["max_load_over_mean"] == 1 if run.arm.name == "dense" else found["max_load_over_mean"] > 1
    (row,) = results["comparisons"]
    assert f"{row['mean']:+.4f}" in text
    (tmp_path / "out" / "loss.png").unlink()
    write_report(experiment, runs, tmp_path / "out", figure=False)
    assert not (tmp_path / "out" / "loss.png").exists()
