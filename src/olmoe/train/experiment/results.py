"""The results of an experiment, as in results.json: every finished run, every arm, every pair of arms.

The loss is in nats per token on held-out text, averaged over its files. An arm's result is that of its best
checkpoint on all of that text; the curve is measured on the windows that the trainer evaluates as it goes.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from olmoe.errors import UserError
from olmoe.train import shared_expert
from olmoe.train.experiment.definition import Experiment
from olmoe.train.experiment.reuse import origin
from olmoe.train.experiment.runs import RESULT, Run, check_settings
from olmoe.train.experiment.schedule import START_RECORD
from olmoe.train.experiment.statistics import Estimate, estimate, holm, paired

_LAST = 0.1  # of a run: over which the measurements of its steps are averaged
_MEASURED = ("cross_entropy", "load_balancing", "router_z", "max_load_over_mean")


def collect(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    """The results of the finished runs. Raises `UserError` if there are none, or if one had other settings."""
    finished = [run for run in runs if run.is_finished]
    for run in finished:
        check_settings(run)
    if not finished:
        raise UserError("No run of this experiment is finished yet; train some first.")
    arms: dict[str, Any] = {}
    for arm in experiment.arms.values():
        of_arm = [run for run in finished if run.arm.name == arm.name]
        if of_arm:
            arms[arm.name] = _arm(of_arm)
    compared = [name for name in arms if experiment.arms[name].compared]
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "seeds": sorted({run.seed for run in finished}),
        "runs_planned": len(runs),
        "runs_finished": len(finished),
        "tokens_per_step": finished[0].config.tokens_per_step,
        "arms": arms,
        "comparisons": _comparisons({name: arms[name] for name in compared}),
    }


def _arm(runs: Sequence[Run]) -> dict[str, Any]:
    arm, first, config = runs[0].arm, runs[0], runs[0].config
    shared = shared_expert.parameters(config)
    measured = {str(run.seed): _run(run) for run in runs}
    return {
        "label": arm.label,
        "compared": arm.compared,
        "parameters": config.model.num_parameters + shared,
        "active_parameters": config.model.num_active_parameters + shared,
        "tokens": first.tokens,
        "tokens_before": first.tokens_before,
        "loss": _plain(estimate([run["loss"] for run in measured.values()])),
        "runs": measured,
    }


def _run(run: Run) -> dict[str, Any]:
    evaluation = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
    held_out = [evaluation["held_out_loss"][name] for name in _held_out_names(run)]
    records = list(run.records())
    steps = [record for record in records if "cross_entropy" in record]
    last = steps[-max(1, round(len(steps) * _LAST)) :]
    curve = [
        [run.tokens_before + record["tokens"], _mean(record["held_out_loss"].values())]
        for record in records
        if record.get("held_out_loss")
    ]
    start = run.folder / START_RECORD
    if start.is_file():
        losses = json.loads(start.read_text(encoding="utf-8"))["held_out_loss"]
        curve.insert(0, [run.tokens_before, _mean(losses.values())])
    found: dict[str, Any] = {
        "loss": _mean(held_out),
        "by_file": dict(zip(_held_out_names(run), held_out, strict=True)),
        "step": evaluation["step"],
        "steps": run.config.total_steps,
        "curve": curve,
    }
    if "expert_load_LE" in evaluation:
        found["unused_experts"] = _unused(list(evaluation["expert_load_LE"].values()))
    if (reused := origin(run.folder)) is not None:
        found["reused_from"] = reused
    return found | {name: round(statistics.fmean(record[name] for record in last), 5) for name in _MEASURED if last}


def _unused(load_FLE: list[list[list[int]]]) -> list[int]:
    """By layer, how many experts no held-out token chose, of the load in each file."""
    return [
        sum(not any(of_file) for of_file in zip(*of_layer, strict=True)) for of_layer in zip(*load_FLE, strict=True)
    ]


def _held_out_names(run: Run) -> list[str]:
    """The files that decide, without those that are only measured: those that the trainer evaluates as it goes."""
    for record in run.records():
        if record.get("held_out_loss"):
            return list(record["held_out_loss"])
    raise UserError(f"{run.name} measured no held-out loss; give data.valid in the shared configuration.")


def _comparisons(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pair of arms, the earlier one subtracted, over the seeds that both have."""
    found: list[dict[str, Any]] = []
    for a, b in itertools.combinations(arms, 2):
        seeds = [seed for seed in arms[a]["runs"] if seed in arms[b]["runs"]]
        if not seeds:
            continue
        ours, theirs = ([arms[name]["runs"][seed]["loss"] for seed in seeds] for name in (a, b))
        differences = {seed: round(y - x, 5) for seed, x, y in zip(seeds, ours, theirs, strict=True)}
        found.append({"from": a, "to": b, "differences": differences, **_plain(paired(ours, theirs))})
    tested = [row for row in found if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return found


def _plain(found: Estimate) -> dict[str, Any]:
    """An estimate for JSON, which has no nan and no infinity."""
    return {key: value if math.isfinite(value) else None for key, value in asdict(found).items()}


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 5)
