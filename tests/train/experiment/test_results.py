"""The contents of results.json, from hand-written run folders."""

from __future__ import annotations

import json
import math

import pytest

from olmoe.errors import UserError
from olmoe.train.experiment.definition import load_experiment
from olmoe.train.experiment.results import collect
from olmoe.train.experiment.runs import lay_out
from small_experiments import DENSE, TOKENS, write_experiment

STEP = {"load_balancing": 1.5, "router_z": 2.0, "max_load_over_mean": 1.25}
# Losses on two files by seed, which results average: 5.0, 5.2, 5.1 and 4.9, 5.0, 5.0.
LOSSES = {"dense": [(4.0, 6.0), (4.2, 6.2), (4.1, 6.1)], "sparse": [(3.9, 5.9), (4.0, 6.0), (4.0, 6.0)]}


def write_finished(run, losses, start=None):
    """A run's files as the trainer writes them; the evaluation file must not count."""
    run.folder.mkdir(parents=True)
    held_out = dict(zip(("one", "two"), losses, strict=True))
    # Two layers of three experts: no token chose the last of the first layer or the last two of the second.
    load_LE = {"one": [[5, 0, 0], [9, 0, 0]], "two": [[5, 2, 0], [9, 0, 0]]}
    evaluation = {"step": 8, "held_out_loss": held_out | {"measured": 99.0}, "expert_load_LE": load_LE}
    (run.folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    records = []
    for step in range(1, 13):
        records.append({"step": step, "tokens": 64 * step, "cross_entropy": 12.0 - step, **STEP})
        if step % 4 == 0:
            shifted = {name: loss + 12 - step for name, loss in held_out.items()}
            records.append({"step": step, "tokens": 64 * step, "held_out_loss": shifted})
    lines = [json.dumps(record) for record in records]
    (run.folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 13, "tok']), encoding="utf-8")
    if start is not None:
        (run.folder / "start.json").write_text(json.dumps({"held_out_loss": start}), encoding="utf-8")


def test_arms_curves_and_comparisons(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    runs = lay_out(experiment, tmp_path / "out", seeds=4)
    for run in runs:
        if run.seed < 4:
            write_finished(run, LOSSES[run.arm.name][run.seed - 1])
    found = json.loads(json.dumps(collect(experiment, runs), allow_nan=False))
    assert (found["experiment"], found["seeds"], found["tokens_per_step"]) == ("small", [1, 2, 3], 64)
    assert (found["runs_planned"], found["runs_finished"]) == (8, 6)
    dense = found["arms"]["dense"]
    assert (dense["tokens"], dense["tokens_before"]) == (TOKENS, 0)
    assert dense["parameters"] == dense["active_parameters"]
    assert found["arms"]["sparse"]["parameters"] > found["arms"]["sparse"]["active_parameters"]
    assert dense["loss"]["mean"] == pytest.approx(5.1)
    assert dense["loss"]["sd"] == pytest.approx(0.1)
    one = dense["runs"]["1"]
    assert one["loss"] == 5.0
    assert one["by_file"] == {"one": 4.0, "two": 6.0}
    assert one["curve"] == [[256, 13.0], [512, 9.0], [768, 5.0]]
    assert one["cross_entropy"] == 0.0  # the last tenth is the last step
    assert one["unused_experts"] == [1, 2]
    assert (one["step"], one["steps"], one["max_load_over_mean"]) == (8, 12, 1.25)
    (row,) = found["comparisons"]
    assert (row["from"], row["to"], row["n"]) == ("dense", "sparse", 3)
    assert row["differences"] == {"1": -0.1, "2": -0.2, "3": -0.1}
    # Mean -0.4 / 3; squares of deviations 0.02 / 3, so sd = sqrt(0.01 / 3) and the standard error is its third's root.
    assert row["mean"] == pytest.approx(-0.4 / 3)
    error = math.sqrt(0.01 / 3) / math.sqrt(3)
    assert row["t"] == pytest.approx(-0.4 / 3 / error)
    assert (row["low"], row["high"]) == pytest.approx(
        (-0.4 / 3 - 4.30265 * error, -0.4 / 3 + 4.30265 * error), abs=1e-5
    )
    assert row["p"] == row["p_holm"] == pytest.approx(1 - 4 / math.sqrt(18))  # t = -4 with two degrees of freedom


def test_seeds_that_one_arm_lacks_are_not_compared(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    runs = lay_out(experiment, tmp_path / "out", seeds=2)
    with pytest.raises(UserError, match="No run of this experiment is finished"):
        collect(experiment, runs)
    for run in runs[:3]:
        write_finished(run, (5.0, 5.0))
    found = collect(experiment, runs)
    assert found["arms"]["dense"]["loss"]["n"] == 2
    (row,) = found["comparisons"]
    assert (row["n"], row["mean"], row["p"], row["differences"]) == (1, 0, None, {"1": 0.0})
    assert "p_holm" not in row


def test_starting_arms_are_not_compared_and_later_curves_continue_theirs(tmp_path, tokenizer_file):
    arms = {"half": {"model": DENSE, "compared": False}, "on": {"start": "half"}, "new": {}}
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file, arms))
    runs = lay_out(experiment, tmp_path / "out", seeds=1)
    for run in runs:
        write_finished(run, (5.0, 6.0), start={"one": 7.0, "two": 9.0} if run.arm.start else None)
    found = collect(experiment, runs)
    assert [(row["from"], row["to"]) for row in found["comparisons"]] == [("on", "new")]
    assert found["arms"]["on"]["runs"]["1"]["curve"] == [[768, 8.0], [1024, 13.5], [1280, 9.5], [1536, 5.5]]
    assert found["arms"]["on"]["tokens_before"] == 768
    assert [arm["compared"] for arm in found["arms"].values()] == [False, True, True]


def test_shared_experts_count_as_parameters(tmp_path, tokenizer_file):
    arms = {"plain": {}, "shared": {"shared_expert": {"width": 24}}}
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file, arms))
    runs = lay_out(experiment, tmp_path / "out", seeds=1)
    for run in runs:
        write_finished(run, (5.0, 6.0))
    plain, shared = collect(experiment, runs)["arms"].values()
    for key in ("parameters", "active_parameters"):
        assert shared[key] - plain[key] == 2 * 3 * 24 * 16  # layers, matrices, width, hidden size


def test_an_experiment_without_held_out_text_is_refused(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    runs = lay_out(experiment, tmp_path / "out", seeds=1)
    write_finished(runs[0], (5.0, 5.0))
    (runs[0].folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "cross_entropy": 5}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"dense, seed 1 measured no held-out loss; give data\.valid"):
        collect(experiment, runs)
