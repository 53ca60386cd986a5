"""The training loop, readable top to bottom: a run is opened, advanced step by step, evaluated and saved.

Each of these is a function over a `Run`, for other loops (of several processes) to call.
"""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from olmoe.errors import ConfigError
from olmoe.io.atomic import write_text
from olmoe.model import CausalLM, initialize
from olmoe.runtime import keep_freed_memory, log, resolve_device, set_threads
from olmoe.train import state
from olmoe.train.config import TrainConfig
from olmoe.train.evaluation import Evaluation, evaluate_all, summary
from olmoe.train.inheritance import check_start_stays, start_folder
from olmoe.train.optim import build_optimizer, clip_gradients
from olmoe.train.run_data import RunData, open_data
from olmoe.train.run_folder import run_lock
from olmoe.train.step import Scales, check_finite, microbatches, train_step
from olmoe.weights import checkpoint, export
from olmoe.weights.checkpoint import Checkpoint


class Interrupted(Exception):
    """Ctrl-C (or SIGTERM) ended the run after a finished step; the checkpoint was saved at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True) -> Path:
    """Run (or continue) a training run and return the folder of its best checkpoint.

    An existing run is refused unless it is to `resume`, or to `overwrite`: then what it wrote is deleted first.

    Writes under `run.output`: `metrics.jsonl`, `checkpoints/step-N` (resumable), `best` (lowest mean held-out
    bits per byte; the last state if nothing is held out) and `evaluation.json` (all of every held-out file,
    by the best checkpoint). Raises `UserError` for bad data or settings, and `Interrupted` after Ctrl-C.
    """
    output = config.resolve(config.run.output)
    start = config.run.initialize_from
    if overwrite and start:
        check_start_stays(start, config.resolve(start), output)
    if not output.is_dir():
        state.begin(output, resume, overwrite)  # makes it, or refuses
    with run_lock(output):
        return _train(config, output, state.begin(output, resume, overwrite), overwrite, show_progress)


def _train(config: TrainConfig, output: Path, newest: Path | None, overwrite: bool, show_progress: bool) -> Path:
    set_threads(config.run.threads)
    keep_freed_memory()
    run = open_run(config, output, newest, overwrite)
    bar = tqdm(
        total=run.config.total_steps * run.config.tokens_per_step,
        initial=run.progress.tokens,
        unit="tok",
        unit_scale=True,
        disable=not show_progress,
    )
    with catch_interrupts() as interrupted, bar, run.metrics_path.open("a", encoding="utf-8") as metrics:
        while run.progress.step < run.config.total_steps:
            values = advance(run)
            run.record(metrics, values)
            bar.update(run.config.tokens_per_step)
            bar.set_postfix(loss=f"{values['cross_entropy']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}")
            if run.is_due(run.config.evaluation.every_steps):
                results, score = evaluate_held_out(run)
                run.record(metrics, summary(results))
                keep_best(run, score)
            stop = bool(interrupted)  # asked once: what comes later waits for the next step
            if stop or run.is_due(run.config.checkpoint.every_steps):
                path = save(run)
                if stop:
                    raise Interrupted(path)
    return report_best(run)


@dataclass
class Run:
    """Everything that a training run consists of between two steps."""

    config: TrainConfig
    output: Path
    device: torch.device
    data: RunData
    model: CausalLM
    optimizer: torch.optim.Optimizer
    progress: state.Progress
    fingerprint: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.config.data.sequence_length

    @property
    def metrics_path(self) -> Path:
        """The file with a record for each step and each evaluation."""
        return self.output / "metrics.jsonl"

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one."""
        return self.progress.step == self.config.total_steps or self.progress.step % every == 0

    def record(self, metrics: TextIO, values: Mapping[str, Any]) -> None:
        """Write one record of the step that was finished last."""
        counters = {"step": self.progress.step, "tokens": self.progress.tokens}
        metrics.write(json.dumps(counters | dict(values)) + "\n")
        metrics.flush()


def open_run(config: TrainConfig, output: Path, newest: Path | None, overwrite: bool = False) -> Run:
    """Data, model and optimizer as the run begins, or as the checkpoint `newest` left them.

    With `overwrite`, what an older run wrote into `output` is deleted, but not before all that the new one needs was
    read.
    """
    device = resolve_device(config.run.device)
    config, data = open_data(config, state.recorded_names(newest))
    model = _start(config, resumed=newest is not None).to(device)
    optimizer = build_optimizer(model, config.optimizer)
    run = Run(
        config, output, device, data, model, optimizer, state.Progress(), config.fingerprint() | data.fingerprint()
    )
    if overwrite:
        state.discard(output)
    if newest is not None:
        run.progress = state.restore(newest, model, optimizer, run.fingerprint)
        log.info("resumed from %s", newest)
        if not state.has_best(output):
            log.warning("%s is missing; the best checkpoint from here on takes its place", output / "best")
            run.progress.best, run.progress.best_step = float("inf"), 0
    state.truncate_metrics(run.metrics_path, run.progress.step)
    epoch_tokens = data.mixture.windows_per_epoch * run.length
    log.info("%.1fM tokens an epoch, %d steps", epoch_tokens / 1e6, config.total_steps)
    return run


def advance(run: Run) -> dict[str, float]:
    """Train by one step; what it measured, by name."""
    started, config, progress = time.perf_counter(), run.config, run.progress
    batches = microbatches(run.data.mixture, config, progress.step, run.device)
    report = train_step(
        run.model, run.optimizer, batches, Scales.of(config), config, progress.tokens, clip=clip_gradients
    )
    progress.step += 1
    progress.tokens += config.tokens_per_step
    seconds = time.perf_counter() - started
    return report.values() | {"tokens_per_second": config.tokens_per_step / seconds}


def evaluate_held_out(run: Run) -> tuple[dict[str, Evaluation], float]:
    """Measure the model on the held-out files; also the score that decides which checkpoint is best (low is good)."""
    results = evaluate_all(run.model, run.data.held_out, run.length, run.config.evaluation.windows)
    score = _score(results)
    if results:
        check_finite("held-out loss", score, run.progress.step, run.config)
    return results, score


def keep_best(run: Run, score: float) -> None:
    """Save the model as the best one if its score says so, or if nothing is held out."""
    if score < run.progress.best or not run.data.held_out:
        run.progress.best, run.progress.best_step = score, run.progress.step
        export.save(run.model, run.output / "best", extra_files=run.data.tokenizer_files, overwrite=True)


def save(run: Run) -> Path:
    """Write a resumable checkpoint and remove those that are too old; its path."""
    path = state.save_state(
        run.output, run.model, run.optimizer, run.progress, run.fingerprint, run.data.tokenizer_files
    )
    state.prune(run.output, run.config.checkpoint.keep)
    return path


def report_best(run: Run) -> Path:
    """Evaluate the best checkpoint on all of every held-out and measured file into `evaluation.json`; its folder."""
    best = run.output / "best"
    if not state.has_best(run.output):  # removed in the meantime, or before a finished run was resumed
        log.warning("%s is missing; the last state takes its place", best)
        run.progress.best_step = run.progress.step
        export.save(run.model, best, extra_files=run.data.tokenizer_files)
    model = checkpoint.load(best, device=run.device)
    final = evaluate_all(model, run.data.held_out + run.data.measured, run.length, 0)
    report: dict[str, Any] = {"step": run.progress.best_step} | summary(final)
    report["expert_load_LE"] = {name: r.counts_LE.tolist() for name, r in final.items()}
    write_text(run.output / "evaluation.json", json.dumps(report) + "\n")
    return best


def _start(config: TrainConfig, *, resumed: bool) -> CausalLM:
    """The model as the run begins: random, or with the weights of the checkpoint that the configuration names."""
    model = CausalLM(config.model)
    if resumed:
        return model  # its weights come with the rest of the state
    if config.run.initialize_from is None:
        initialize(model, config.run.seed)
        return model
    folder = start_folder(config.run.initialize_from, config.resolve(config.run.initialize_from))
    start = Checkpoint.open(folder)
    if start.layout is not None:
        raise ConfigError(
            f"run.initialize_from {str(folder)!r} is a packed checkpoint, whose weights are rounded; give the one that "
            "it was packed from."
        )
    weights = start.load(dtype=torch.float32).state_dict()
    for name, parameter in model.state_dict().items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = "is not there" if name not in weights else f"has the shape {list(weights[name].shape)}"
            raise ConfigError(
                f"run.initialize_from {str(folder)!r} does not fit [model]: {name} {found}, "
                f"where {list(parameter.shape)} is described."
            )
    model.load_state_dict(weights)
    return model


def _score(results: dict[str, Evaluation]) -> float:
    """What `best` minimises: the mean over files of bits per byte, or of the loss where bytes are unknown."""
    if not results:
        return float("inf")
    bits = statistics.fmean(r.bits_per_byte for r in results.values())
    return bits if np.isfinite(bits) else statistics.fmean(r.loss for r in results.values())


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the loop to act on between steps; a second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        log.warning("finishing this step, then saving; interrupt again to stop at once")

    def restore() -> None:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: a handler that is not Python's

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        try:
            previous[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield received
    finally:
        restore()
