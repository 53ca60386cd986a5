"""Runs that two experiments have in common are trained once: the second experiment reuses the result.

Experiments whose folders are side by side often have the same shared configuration, so that an arm of one is also an
arm of another: 8 of 64 experts are compared with a dense model in one, and with other numbers of experts in the next.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from olmoe.errors import UserError
from olmoe.io.atomic import atomic_folder, write_text
from olmoe.runtime import log
from olmoe.train.config import TrainConfig, load_config
from olmoe.train.experiment.runs import FILE, RESULT, Run
from olmoe.train.run_data import open_data
from olmoe.train.run_folder import latest, run_lock
from olmoe.train.state import read_state

RECORD = "reused.json"  # beside a reused run: which one it is


def reuse(run: Run) -> bool:
    """Reuse the same run of a neighbouring experiment if it is finished there; whether there was one.

    It is the same if the trainer would have continued one with the other (model, texts, order, optimizer, seed) and
    evaluates and skips alike. Runs that start from another one are always trained.
    """
    if run.has_begun or run.earlier is not None:
        return False
    (run.folder / RECORD).unlink(missing_ok=True)  # perhaps of an interrupted copy
    experiments = run.folder.parents[2]
    fingerprint: dict[str, Any] | None = None
    for found in sorted(experiments.glob(f"*/*/{run.folder.name}/{RESULT}")):
        newest = latest(found.parent)
        if newest is None or not _is_alike(found.parent, run.config):
            continue
        if fingerprint is None:
            config, data = open_data(run.config, [])
            fingerprint = config.fingerprint() | data.fingerprint()
        try:
            read_state(newest, fingerprint)
        except UserError:  # other texts, for example
            continue
        with run_lock(run.folder):
            _take_over(found.parent, run.folder, experiments)
        log.info("%s is %s", run.name, found.parent.relative_to(experiments))
        return True
    return False


def origin(folder: Path) -> str | None:
    """The run that the one in `folder` was copied from, as EXPERIMENT/ARM/seed-N; None if it was trained here."""
    path = folder / RECORD
    return str(json.loads(path.read_text(encoding="utf-8"))["from"]) if path.is_file() else None


def _is_alike(folder: Path, config: TrainConfig) -> bool:
    """Whether a run has the settings that a fingerprint does not hold, or only roughly."""
    try:
        other = load_config(folder / FILE)
    except UserError:  # of another version, or no run of an experiment
        return False

    def settings(c: TrainConfig) -> tuple[Any, ...]:
        return c.run.seed, c.run.initialize_from, c.model, c.shared_expert, c.batch, c.evaluation, c.skip

    return settings(other) == settings(config)


def _take_over(source: Path, target: Path, experiments: Path) -> None:
    """Copy what results are made of, and what arms start from; the file that marks it as finished comes last."""
    with atomic_folder(target / "best") as temporary:
        shutil.copytree(source / "best", temporary, dirs_exist_ok=True)
    where = {"from": source.relative_to(experiments).as_posix()}
    write_text(target / RECORD, json.dumps(where) + "\n")
    for name in ("metrics.jsonl", RESULT):
        write_text(target / name, (source / name).read_text(encoding="utf-8"))
