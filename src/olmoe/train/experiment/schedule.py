"""Training the runs of an experiment, several at a time, each in its own process.

Runs that are finished, here or in an experiment beside this one (see `reuse`), are not trained again, interrupted ones
continue from their checkpoint, and a run waits for the one that it starts from. A process trains one run, so that one
that the system kills takes no other with it. Should this process die, the others notice, because their standard input
is a pipe from here; they save and exit.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from olmoe.errors import UserError
from olmoe.io.atomic import write_text
from olmoe.runtime import log
from olmoe.train.evaluation import evaluate_all, summary
from olmoe.train.experiment.definition import plan_of
from olmoe.train.experiment.reuse import reuse
from olmoe.train.experiment.runs import FILE, Run, write_configuration
from olmoe.train.run_data import open_data
from olmoe.weights import checkpoint, export
from olmoe.weights.source import load_model
from olmoe.weights.upcycle import UpcycledSource

START_RECORD = "start.json"
_LOG = "log.txt"
_SECONDS = 0.5  # between checks of the processes
# Terminal interrupts go only to this process, which passes them on.
_APART: dict[str, Any] = {
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}

Progress = Callable[[int, str], None]  # tokens trained on, and in words how many runs that is


def train_all(runs: Sequence[Run], jobs: int = 1, progress: Progress | None = None) -> None:
    """Train what is not finished, `jobs` runs at a time.

    Data is read and tokenized first, so that mistakes in it show at once. Raises `UserError` for a run that fails; the
    others are stopped then, and save. `KeyboardInterrupt` stops them as well, and a second one ends them as they are.
    """
    if jobs < 1:
        raise UserError(f"At least 1 run must be trained at a time, not {jobs}.")
    for run in runs:
        write_configuration(run)
    for run in runs:
        reuse(run)
    for run in {run.arm.name: run for run in runs if not run.is_finished}.values():
        open_data(run.config, [])
    with _Working(jobs) as working:
        while not all(run.is_finished for run in runs):
            working.collect()
            for run in runs:
                ready = run.earlier is None or run.earlier.is_finished
                if ready and not run.is_finished and working.has_room_for(run):
                    working.begin(run)
            if progress is not None:
                _tell(runs, working.count, progress)
            time.sleep(_SECONDS)
        working.collect()
    if progress is not None:
        _tell(runs, 0, progress)


class _Working:
    """The running processes. Leaving the block stops them and waits until they have saved."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._processes: dict[Path, tuple[Run, subprocess.Popen[bytes]]] = {}

    def __enter__(self) -> _Working:
        return self

    def __exit__(self, *_: object) -> None:
        processes = [process for _, process in self._processes.values()]
        try:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
            for process in processes:
                process.wait()
        except BaseException:
            for process in processes:
                process.kill()
            raise

    @property
    def count(self) -> int:
        """How many are running."""
        return len(self._processes)

    def has_room_for(self, run: Run) -> bool:
        """Whether the run is not running yet and another one may start."""
        return run.folder not in self._processes and len(self._processes) < self._jobs

    def begin(self, run: Run) -> None:
        """Start the process of a run, after what it starts from was made."""
        if run.earlier is not None and not run.has_begun:
            _make_start(run)
        command = [sys.executable, "-m", "olmoe.train.experiment.worker", str(run.folder / FILE)]
        with (run.folder / _LOG).open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, **_APART)
        self._processes[run.folder] = run, process

    def collect(self) -> None:
        """Forget processes that have ended. Raises `UserError` for one that failed."""
        ended = [(run, process) for run, process in self._processes.values() if process.poll() is not None]
        for run, process in ended:
            del self._processes[run.folder]
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for run, process in ended:
            if process.returncode != 0 or not run.is_finished:
                raise UserError(_failure(run, process.returncode))
            log.info("%s is trained", run.name)


def _failure(run: Run, code: int) -> str:
    """How a run failed, in one sentence."""
    told = run.folder / _LOG
    last = (told.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    if code == 2 and last.startswith("olmoe: "):
        return f"{run.name}: {last.removeprefix('olmoe: ')}"
    return f"The training of {run.name} ended with code {code}; see {told}, then run the same command again to go on."


def _make_start(run: Run) -> None:
    """The checkpoint that a run starts from, and its loss before the first step."""
    assert run.earlier is not None
    source = checkpoint.open_source(run.earlier.folder / "best")
    if run.arm.upcycle:
        source = UpcycledSource(source, plan_of(run.arm.upcycle, run.seed))
    model = load_model(source, torch.float32)
    if run.arm.upcycle:
        export.save(model, run.start, extra_files=source.files(), overwrite=True)
    config, data = open_data(run.config, [])
    results = evaluate_all(model, data.held_out, config.data.sequence_length, config.evaluation.windows)
    write_text(run.folder / START_RECORD, json.dumps(summary(results)) + "\n")


def _tell(runs: Sequence[Run], working: int, progress: Progress) -> None:
    done = sum(run.tokens if run.is_finished else _tokens(run.folder / "metrics.jsonl") for run in runs)
    progress(done, f"{sum(run.is_finished for run in runs)} of {len(runs)} runs, {working} at work")


def _tokens(metrics: Path) -> int:
    """How many tokens a run has been trained on, by its last complete record."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 8192))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for line in reversed(lines[:-1]):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["tokens"])
    return 0
