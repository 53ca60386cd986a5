"""A run of `olmoe train`, `sft` or `dpo` from its metrics.jsonl, as arrays: losses, rates, speed, expert load.

Shapes legend: S steps, C columns of some steps each, L layers, E experts.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from olmoe.errors import UserError

Floats = npt.NDArray[np.float64]
# Numbers of a step: one, or one per layer.
SCALARS = (
    "cross_entropy", "loss", "accuracy", "margin", "load_balancing", "router_z", "learning_rate", "grad_norm",
    "tokens_per_second", "mfu", "peak_memory_bytes", "peak_device_memory_bytes",
)  # fmt: skip
BY_LAYER = ("expert_entropy", "dead_experts", "router_margin", "router_cutoff_margin")


class TrainingLoad(NamedTuple):
    """How many tokens each expert of each layer received in each step, `counts` (S, L, E).

    `steps` (S,) are the numbers of the steps, `tokens` (S,) the tokens that training had seen after each.
    `metrics.balance(counts[i])` says how evenly a step used its experts; sums over steps are loads too.
    """

    steps: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int32]


def read_load(path: str | Path, every: int = 1) -> TrainingLoad:
    """The loads that `olmoe train` recorded, once every `every` steps.

    `path` is a run's folder, or its metrics.jsonl, which may still grow. Raises `UserError` for a file without such
    records.
    """
    steps, tokens, counts = [], [], []
    with _records(path) as records:
        for record in records:
            if "expert_load" in record and record["step"] % every == 0:
                steps.append(record["step"])
                tokens.append(record["tokens"])
                counts.append(np.asarray(record["expert_load"], dtype=np.int32))
        stacked = np.stack(counts) if counts else None
    if stacked is None:
        raise UserError(f"{metrics_path(path)} has no step with the load of experts; train with this version of olmoe.")
    return TrainingLoad(np.array(steps, dtype=np.int64), np.array(tokens, dtype=np.int64), stacked)


@dataclass(frozen=True)
class TrainingCurves:
    """A run in columns of `stride` steps (the last may have fewer), so that long runs are no larger than short ones.

    `steps` and `tokens` (C,) are those after each column. `mean`, `low` and `high` hold the `SCALARS` (C,) that were
    recorded, `by_layer` the means of `BY_LAYER` (C, L), and `load` the tokens of each expert (C, L, E); NaN means that
    a value was not recorded. `held_out` has, by file, tokens, loss and bits per byte (NaN if unknown) of each
    evaluation, `skipped` the numbers of steps that changed no weights.
    """

    stride: int
    steps: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    mean: dict[str, Floats]
    low: dict[str, Floats]
    high: dict[str, Floats]
    by_layer: dict[str, Floats]
    load: npt.NDArray[np.int64] | None
    held_out: dict[str, list[tuple[int, float, float]]]
    skipped: list[int]

    @property
    def loss(self) -> str:
        """The name of what is trained: fine-tuning records `loss`, `olmoe train` `cross_entropy`."""
        return "loss" if "loss" in self.mean else "cross_entropy"

    @property
    def loss_unit(self) -> str:
        """What losses are measured in: those of `olmoe dpo`, which records an `accuracy`, have no unit."""
        return "" if "accuracy" in self.mean else "nats per token"


def read_curves(path: str | Path, most: int = 400) -> TrainingCurves:
    """A run's curves, in at most `most` columns, an even number.

    `path` is its folder, or its metrics.jsonl, which may still grow. Raises `UserError` for one without a training
    step.
    """
    stride, columns = 1, list[_Column]()
    held_out: dict[str, list[tuple[int, float, float]]] = {}
    skipped: list[int] = []

    def steps(records: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for record in records:
            for name, loss in record.get("held_out_loss", {}).items():
                bits = record.get("bits_per_byte", {}).get(name)
                held_out.setdefault(name, []).append((record["tokens"], loss, np.nan if bits is None else bits))
            if record.get("skipped"):
                skipped.append(record["step"])
            if "learning_rate" in record:
                yield record

    with _records(path) as records:
        trained = steps(records)
        while group := list(itertools.islice(trained, stride)):
            if len(columns) == most:
                columns = [_joined(a, b) for a, b in zip(columns[::2], columns[1::2], strict=True)]
                group += itertools.islice(trained, stride)
                stride *= 2
            columns.append(_column(group))
    if not columns:
        raise UserError(f"{metrics_path(path)} has no training step yet; wait until the run has made one.")
    return _curves(stride, columns, held_out, skipped)


def metrics_path(path: str | Path) -> Path:
    """The metrics.jsonl of a run's folder, or the file itself."""
    path = Path(os.path.expanduser(path))
    return path / "metrics.jsonl" if path.is_dir() else path


@contextmanager
def _records(path: str | Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The records of a run, one after another; errors in them are one sentence."""
    path = metrics_path(path)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:  # which may end within a character
            whole = itertools.takewhile(lambda line: line.endswith("\n"), file)  # the last one may be incomplete
            yield map(json.loads, whole)
    except OSError as error:
        raise UserError(f"The metrics {path} cannot be read ({error.strerror}); give the folder of a run.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the metrics of a run ({error}).") from None


@dataclass(frozen=True)
class _Column:
    """Several steps combined; see `TrainingCurves`."""

    count: int
    step: int
    tokens: int
    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    by_layer: dict[str, Floats]
    load: npt.NDArray[np.int64] | None


def _column(records: Sequence[Mapping[str, Any]]) -> _Column:
    mean, low, high = dict[str, float](), dict[str, float](), dict[str, float]()
    for name in SCALARS:
        values = np.array([record.get(name) for record in records], dtype=np.float64)  # None becomes NaN
        known = values[np.isfinite(values)]
        if len(known):
            mean[name], low[name], high[name] = float(known.mean()), float(known.min()), float(known.max())
    by_layer = {}
    for name in BY_LAYER:
        rows = [record[name] for record in records if name in record]
        if rows:
            by_layer[name] = _mean_of_known(np.array(rows, dtype=np.float64))
    loads = [record["expert_load"] for record in records if "expert_load" in record]
    load = np.array(loads, dtype=np.int64).sum(axis=0) if loads else None
    return _Column(len(records), records[-1]["step"], records[-1]["tokens"], mean, low, high, by_layer, load)


def _joined(a: _Column, b: _Column) -> _Column:
    def mean(x: Any, y: Any) -> Any:
        both = (a.count * x + b.count * y) / (a.count + b.count)
        return np.where(np.isnan(x), y, np.where(np.isnan(y), x, both))

    return _Column(
        a.count + b.count,
        b.step,
        b.tokens,
        {n: float(mean(a.mean.get(n, np.nan), b.mean.get(n, np.nan))) for n in a.mean | b.mean},
        {n: min(a.low.get(n, np.inf), b.low.get(n, np.inf)) for n in a.low | b.low},
        {n: max(a.high.get(n, -np.inf), b.high.get(n, -np.inf)) for n in a.high | b.high},
        {n: mean(a.by_layer.get(n, np.nan), b.by_layer.get(n, np.nan)) for n in a.by_layer | b.by_layer},
        a.load if b.load is None else b.load if a.load is None else a.load + b.load,
    )


def _mean_of_known(rows: Floats) -> Floats:
    """The mean over rows of the numbers in each column; NaN if it has none."""
    known = np.isfinite(rows)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, rows, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _curves(
    stride: int,
    columns: list[_Column],
    held_out: dict[str, list[tuple[int, float, float]]],
    skipped: list[int],
) -> TrainingCurves:
    def values(of: str, name: str) -> Floats:
        return np.array([getattr(column, of).get(name, np.nan) for column in columns], dtype=np.float64)

    names = [name for name in SCALARS if any(name in column.mean for column in columns)]
    by_layer = {}
    for name in BY_LAYER:
        rows = [column.by_layer.get(name) for column in columns]
        layers = next((len(row) for row in rows if row is not None), 0)
        if layers:
            by_layer[name] = np.stack([np.full(layers, np.nan) if row is None else row for row in rows])
    load = next((np.zeros_like(column.load) for column in columns if column.load is not None), None)
    return TrainingCurves(
        stride,
        np.array([column.step for column in columns], dtype=np.int64),
        np.array([column.tokens for column in columns], dtype=np.int64),
        {name: values("mean", name) for name in names},
        {name: values("low", name) for name in names},
        {name: values("high", name) for name in names},
        by_layer,
        None if load is None else np.stack([load if c.load is None else c.load for c in columns]),
        held_out,
        skipped,
    )
