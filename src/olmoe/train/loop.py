"""The training loop, readable top to bottom: a run is opened, advanced step by step, evaluated and saved.

Each of these is a function over a `Run`, for other loops (of several processes) to call.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from olmoe.errors import ConfigError
from olmoe.io.atomic import write_text
from olmoe.model import CausalLM, initialize, set_products
from olmoe.runtime import keep_freed_memory, log, resolve_device, set_threads
from olmoe.train import parallel, precision, state
from olmoe.train.config import LogConfig, TrainConfig
from olmoe.train.evaluation import Evaluation, evaluate_all, summary
from olmoe.train.inheritance import check_start_stays, start_folder
from olmoe.train.optim import build_optimizer, clip_gradients
from olmoe.train.ranks import ALONE, Ranks, join_ranks
from olmoe.train.run_data import RunData, open_data
from olmoe.train.run_folder import run_lock
from olmoe.train.sharded_export import export_sharded
from olmoe.train.shards import assign, load_weights
from olmoe.train.skipping import StepFilter
from olmoe.train.step import Scales, check_finite, microbatches, train_step
from olmoe.train.throughput import Throughput
from olmoe.train.trackers import Tracker, check_installed, open_trackers, scalars
from olmoe.weights import checkpoint, export
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.names import EMBEDDING, HEAD, parameter_shapes
from olmoe.weights.sharded_folder import is_sharded

if TYPE_CHECKING:
    from olmoe.train.sharded_state import ShardSaver

CPU = torch.device("cpu")


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
    with (
        join_ranks(config.run.device, group_of_one=config.compute.precision == "bf16") as ranks,
        ranks.guarded(lambda: state.way_on(output)),
        ExitStack() as stack,
    ):

        def begin() -> Path | None:
            if not output.is_dir():
                state.begin(output, resume, overwrite)  # makes it, or refuses
            stack.enter_context(run_lock(output))
            return state.begin(output, resume, overwrite)

        return _train(config, output, ranks.on_first(begin), overwrite, show_progress and ranks.is_first, ranks)


def _train(
    config: TrainConfig, output: Path, newest: Path | None, overwrite: bool, show_progress: bool, ranks: Ranks
) -> Path:
    set_threads(config.run.threads)
    keep_freed_memory()
    ranks.on_all(lambda: check_installed(config.log))
    run = open_run(config, output, newest, overwrite, ranks)
    bar = tqdm(
        total=run.config.total_steps * run.config.tokens_per_step,
        initial=run.progress.tokens,
        unit="tok",
        unit_scale=True,
        disable=not show_progress,
    )
    with catch_interrupts() as interrupted, run.tracking(), run.saving(), bar, run.open_metrics() as metrics:
        while run.progress.step < run.config.total_steps:
            values = advance(run)
            run.record(metrics, values)
            bar.update(run.config.tokens_per_step)
            bar.set_postfix(loss=f"{values['cross_entropy']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}")
            if run.is_due(run.config.evaluation.every_steps):
                results, score = evaluate_held_out(run)
                run.record(metrics, summary(results))
                keep_best(run, score)
            stop = run.must_stop(bool(interrupted))  # asked once: what comes later waits for the next step
            if stop or run.is_due(run.config.checkpoint.every_steps):
                path = save(run)
                if stop:
                    run.finish_saving()
                    raise Interrupted(path)
    return report_best(run)


@dataclass
class Run:
    """Everything that a training run consists of between two steps.

    What only several processes need is imported where they need it, because it takes as long as torch itself.
    """

    config: TrainConfig
    output: Path
    device: torch.device
    data: RunData
    model: CausalLM
    optimizer: torch.optim.Optimizer
    progress: state.Progress
    fingerprint: dict[str, Any]
    ranks: Ranks = ALONE
    saver: ShardSaver | None = field(default=None, init=False)
    filter: StepFilter = field(init=False)
    trackers: list[Tracker] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.is_sharded:
            from olmoe.train.sharded_state import ShardSaver

            self.saver = ShardSaver(self.ranks)

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """What the configuration asks for shows the records that are made in the block; the first rank's."""
        log_to = self.config.log if self.ranks.is_first else LogConfig()
        opening = open_trackers(log_to, self.output, self.progress.step, self.config.fingerprint())
        with ExitStack() as stack:
            self.trackers = self.ranks.on_all(lambda: stack.enter_context(opening))
            yield

    @cached_property
    def throughput(self) -> Throughput:
        """What the speed of a step is held against."""
        return Throughput.of(self.config.model, self.device, self.config.run.peak_flops, self.ranks)

    @property
    def is_sharded(self) -> bool:
        """Whether the model's parameters are shards, of which this process holds its own."""
        return parallel.is_parallel(self.config, self.ranks)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.config.data.sequence_length

    @property
    def metrics_path(self) -> Path:
        """The file with a record for each step and each evaluation."""
        return self.output / "metrics.jsonl"

    def rest(self) -> None:
        """Let a sharded model's parameters be shards again after a forward pass that no backward followed."""
        if self.is_sharded:
            self.model.reshard()  # type: ignore[operator]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Layers that stay whole for a backward pass become shards after each forward pass, which none follows."""
        if not self.is_sharded:
            yield
            return
        from olmoe.train.sharding import keep_whole, stays_whole

        keep_whole(self.model, False)
        yield
        keep_whole(self.model, stays_whole(self.config))

    def must_stop(self, interrupted: bool) -> bool:
        """Whether any process was interrupted. Raises `UserError` on all if a checkpoint could not be written."""
        stop, failed = self.ranks.any(interrupted, self.saver is not None and self.saver.has_failed)
        if failed:
            self.finish_saving()
        return stop

    def finish_saving(self) -> None:
        """Wait until all checkpoints are whole."""
        if self.saver is not None:
            self.saver.finish()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Nothing is being written any more when the block ends, however it does."""
        try:
            yield
            self.finish_saving()
        finally:
            if self.saver is not None:
                self.saver.close()

    def open_metrics(self) -> TextIO:
        """The file that records go to; only the first rank's are kept."""
        path = self.metrics_path if self.ranks.is_first else os.devnull
        return open(path, "a", encoding="utf-8")

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one."""
        return self.progress.step == self.config.total_steps or self.progress.step % every == 0

    def record(self, metrics: TextIO, values: Mapping[str, Any]) -> None:
        """Write one record of the step that was finished last."""
        counters = {"step": self.progress.step, "tokens": self.progress.tokens}
        # JSON has no word for what a skipped step may have measured.
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
        metrics.write(json.dumps(counters | finite) + "\n")
        metrics.flush()
        for tracker in self.trackers:
            tracker.write(self.progress.step, scalars(values))


def open_run(
    config: TrainConfig, output: Path, newest: Path | None, overwrite: bool = False, ranks: Ranks = ALONE
) -> Run:
    """Data, model and optimizer as the run begins, or as the checkpoint `newest` left them.

    With `overwrite`, what an older run wrote into `output` is deleted, but not before all that the new one needs was
    read.
    """
    device = ranks.device(resolve_device(config.run.device))
    ranks.on_all(lambda: parallel.check(config, ranks))
    ranks.on_all(lambda: precision.check(config, device))
    config, data = ranks.first_in_turn(lambda: open_data(config, state.recorded_names(newest)))
    model = _start(config, resumed=newest is not None, device=device, ranks=ranks)
    optimizer = build_optimizer(model, config.optimizer)
    fingerprint = config.fingerprint() | data.fingerprint()
    run = Run(config, output, device, data, model, optimizer, state.Progress(), fingerprint, ranks)
    if overwrite:
        ranks.on_first(lambda: state.discard(output))
    if newest is not None:
        restore = state.restore
        if is_sharded(newest):
            from olmoe.train.sharded_state import restore_shards as restore
        run.progress = ranks.on_all(lambda: restore(newest, model, optimizer, run.fingerprint))
        log.info("resumed from %s", newest)
        if not ranks.on_first(lambda: state.has_best(output)):
            log.warning("%s is missing; the best checkpoint from here on takes its place", output / "best")
            run.progress.best, run.progress.best_step = float("inf"), 0
    run.filter = StepFilter(config.skip, run.progress.recent)
    ranks.on_first(lambda: state.truncate_metrics(run.metrics_path, run.progress.step))
    epoch_tokens = data.mixture.windows_per_epoch * run.length
    log.info("%.1fM tokens an epoch, %d steps", epoch_tokens / 1e6, config.total_steps)
    return run


def advance(run: Run) -> dict[str, Any]:
    """Train by one step; what it measured, by name."""
    started, config, progress, ranks = time.perf_counter(), run.config, run.progress, run.ranks
    report = train_step(
        run.model,
        run.optimizer,
        microbatches(run.data.mixture, config, progress.step, run.device, ranks.rank, ranks.size),
        Scales.of(config, ranks.size),
        config,
        progress.tokens,
        clip=parallel.clip_across(ranks, config.parallel.replicate) if run.is_sharded else clip_gradients,
        combine=lambda report: parallel.combine(report, ranks),
        admits=run.filter.admits,
        count=(lambda counts: ranks.sum(counts.clone())) if config.parallel.balance == "all" else None,
    )
    progress.step += 1
    progress.tokens += config.tokens_per_step
    seconds = time.perf_counter() - started
    return report.values() | run.throughput.values(config.tokens_per_step, seconds)


def evaluate_held_out(run: Run) -> tuple[dict[str, Evaluation], float]:
    """Measure the model on the held-out files; also the score that decides which checkpoint is best (low is good)."""
    windows = run.config.evaluation.windows
    with run.measuring():
        results = evaluate_all(run.model, run.data.held_out, run.length, windows, run.ranks, run.config.mask_eos_id)
    score = _score(results)
    if results:
        check_finite("held-out loss", score, run.progress.step, run.config)
    return results, score


def keep_best(run: Run, score: float) -> None:
    """Save the model as the best one if its score says so, or if nothing is held out."""
    if score < run.progress.best or not run.data.held_out:
        run.progress.best, run.progress.best_step = score, run.progress.step
        _export(run, overwrite=True)


def _export(run: Run, overwrite: bool = False) -> None:
    best, texts = run.output / "best", run.data.tokenizer_files
    if run.is_sharded:
        run.rest()
        export_sharded(run.model, best, run.ranks, texts)
    else:
        export.save(run.model, best, extra_files=texts, overwrite=overwrite)


def save(run: Run) -> Path:
    """Write a resumable checkpoint and remove those that are too old; its path.

    That of several processes is written while training goes on; see `ShardSaver.finish`.
    """
    keep = run.config.checkpoint.keep
    if run.saver is not None:
        from olmoe.train.sharded_state import tensors_of, texts_of

        run.rest()
        path = state.checkpoint_path(run.output, run.progress)
        texts = texts_of(run.model, run.optimizer, run.progress, run.fingerprint, run.data.tokenizer_files)
        tensors = tensors_of(run.model, run.optimizer)
        run.saver.start(path, tensors, texts, then=lambda: state.prune(run.output, keep))
        return path
    path = state.save_state(
        run.output, run.model, run.optimizer, run.progress, run.fingerprint, run.data.tokenizer_files
    )
    state.prune(run.output, keep)
    return path


def report_best(run: Run) -> Path:
    """Evaluate the best checkpoint on all of every held-out and measured file into `evaluation.json`; its folder."""
    best = run.output / "best"
    is_there = run.ranks.on_first(lambda: state.has_best(run.output))
    if not is_there:  # removed in the meantime, or before a finished run was resumed
        log.warning("%s is missing; the last state takes its place", best)
        run.progress.best_step = run.progress.step
        _export(run)
    model = run.model
    if run.is_sharded:
        run.rest()
        run.ranks.on_all(lambda: load_weights(model, Checkpoint.open(best).source()))
        set_products(model, None)  # as whoever opens the checkpoint computes
    else:
        model = checkpoint.load(best, device=run.device)
    files = run.data.held_out + run.data.measured
    final = evaluate_all(model, files, run.length, 0, run.ranks, run.config.mask_eos_id)
    report: dict[str, Any] = {"step": run.progress.best_step} | summary(final)
    report["expert_load_LE"] = {name: r.counts_LE.tolist() for name, r in final.items()}
    run.ranks.on_first(lambda: write_text(run.output / "evaluation.json", json.dumps(report) + "\n"))
    return best


def _start(config: TrainConfig, *, resumed: bool, device: torch.device = CPU, ranks: Ranks = ALONE) -> CausalLM:
    """The model as the run begins: random, or with the weights of the checkpoint that the configuration names.

    One that is `resumed` gets its weights with the rest of the state.
    """
    if parallel.is_parallel(config, ranks):
        from olmoe.train.sharding import build_parallel

        model = build_parallel(config, ranks, device)
        precision.set_up(model, config)
        if not resumed:
            ranks.on_all(lambda: _fill(model, config, assign))
        return model
    model = CausalLM(config.model)
    precision.set_up(model, config)
    if not resumed:
        _fill(model, config)
    for layer in model.model.layers:
        parallel.arrange(layer, config)
    return model.to(device)


def _fill(
    model: CausalLM, config: TrainConfig, place: Callable[[torch.nn.Parameter, torch.Tensor], None] | None = None
) -> None:
    """Give a model its first weights. Raises `ConfigError` for a checkpoint that does not have them."""
    if config.run.initialize_from is None:
        initialize(model, config.run.seed, place)
        return
    folder = start_folder(config.run.initialize_from, config.resolve(config.run.initialize_from))
    start = Checkpoint.open(folder)
    if start.layout is not None:
        raise ConfigError(
            f"run.initialize_from {str(folder)!r} is a packed checkpoint, whose weights are rounded; give the one that "
            "it was packed from."
        )
    shapes = parameter_shapes(start.config)
    shapes.setdefault(HEAD, shapes[EMBEDDING])  # tied, it is the embedding
    for name, parameter in model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            found = f"has the shape {list(shapes[name])}" if name in shapes else "is not there"
            raise ConfigError(
                f"run.initialize_from {str(folder)!r} does not fit [model]: {name} {found}, "
                f"where {list(parameter.shape)} is described."
            )
    load_weights(model, start.source())


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
