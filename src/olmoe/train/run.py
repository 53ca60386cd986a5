"""What runs of every kind share: their folder and ranks, their records and checkpoints, and how signals end them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np
import torch

from olmoe.model import CausalLM
from olmoe.runtime import keep_freed_memory, log, set_threads
from olmoe.train import state
from olmoe.train.config import LogConfig, RunConfig
from olmoe.train.inheritance import check_start_stays
from olmoe.train.ranks import ALONE, Ranks, join_ranks
from olmoe.train.run_folder import run_lock
from olmoe.train.sharded_export import export_sharded
from olmoe.train.shards import load_weights
from olmoe.train.shared_expert import source_of
from olmoe.train.trackers import Tracker, open_trackers, scalars
from olmoe.weights import export
from olmoe.weights.sharded_folder import is_sharded

if TYPE_CHECKING:
    from olmoe.train.sharded_state import ShardSaver


class Interrupted(Exception):
    """Ctrl-C (or SIGTERM) ended the run after a finished step; the checkpoint was saved at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class RunFile(Protocol):
    """A configuration of any kind of run."""

    @property
    def run(self) -> RunConfig:
        """Where it writes."""
        ...

    def resolve(self, path: str) -> Path:
        """A path of the configuration as seen from the current folder."""
        ...


@contextmanager
def opened(
    config: RunFile, resume: bool, overwrite: bool, group_of_one: bool = False
) -> Iterator[tuple[Ranks, Path, Path | None]]:
    """The ranks of a run, its folder, which is theirs until the block ends, and the checkpoint to continue from.

    Raises `UserError` where there is a run that is neither to be resumed nor to be overwritten.
    """
    output, start = config.resolve(config.run.output), config.run.initialize_from
    if overwrite and start:
        check_start_stays(start, config.resolve(start), output)
    with (
        join_ranks(config.run.device, group_of_one=group_of_one) as ranks,
        ranks.guarded(lambda: state.way_on(output)),
        ExitStack() as stack,
    ):
        # A second Ctrl-C may arrive where torch's optimizers have turned gradients off, and before they turn them on.
        stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())

        def begin() -> Path | None:
            if not output.is_dir():
                state.begin(output, resume, overwrite)  # makes it, or refuses
            stack.enter_context(run_lock(output))
            return state.begin(output, resume, overwrite)

        newest = ranks.on_first(begin)
        set_threads(config.run.threads)
        keep_freed_memory(large=True)
        yield ranks, output, newest


@dataclass(kw_only=True)
class BaseRun:
    """The whole state of a run of any kind between two steps.

    `files` are what checkpoints hold of the tokenizer, by name; `keep` is how many checkpoints stay. With
    `saves_shards` each rank writes what it holds of model and optimizer. What only several processes need is imported
    where they need it, because it takes as long as torch itself.
    """

    output: Path
    device: torch.device
    model: CausalLM
    optimizer: torch.optim.Optimizer
    fingerprint: dict[str, Any]
    files: dict[str, str]
    steps: int
    keep: int
    is_sharded: bool = False
    saves_shards: bool = False
    ranks: Ranks = ALONE
    progress: state.Progress = field(default_factory=state.Progress)
    saver: ShardSaver | None = field(default=None, init=False)
    trackers: list[Tracker] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.saves_shards:
            from olmoe.train.sharded_state import ShardSaver

            self.saver = ShardSaver(self.ranks)

    @property
    def metrics_path(self) -> Path:
        """The file with a record for each step and each evaluation."""
        return self.output / "metrics.jsonl"

    def rest(self) -> None:
        """Reshard a sharded model's parameters after a forward pass that no backward pass followed."""
        if self.is_sharded:
            self.model.reshard()  # type: ignore[operator]

    # ---- records ----

    @contextmanager
    def tracking(self, log_to: LogConfig, settings: dict[str, Any]) -> Iterator[None]:
        """Within the block, the trackers that the configuration names show the first rank's records."""
        log_to = log_to if self.ranks.is_first else LogConfig()
        opening = open_trackers(log_to, self.output, self.progress.step, settings)
        with ExitStack() as stack:
            self.trackers = self.ranks.on_all(lambda: stack.enter_context(opening))
            yield

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one."""
        return self.progress.step == self.steps or self.progress.step % every == 0

    def open_metrics(self) -> TextIO:
        """The file that records go to; only the first rank's are kept."""
        path = self.metrics_path if self.ranks.is_first else os.devnull
        return open(path, "a", encoding="utf-8")

    def record(self, metrics: TextIO, values: Mapping[str, Any]) -> None:
        """Write one record of the step that was finished last."""
        counters = {"step": self.progress.step, "tokens": self.progress.tokens}
        # JSON cannot express nan or infinity, which a skipped step may have measured.
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
        metrics.write(json.dumps(counters | finite, ensure_ascii=False) + "\n")
        metrics.flush()
        for tracker in self.trackers:
            tracker.write(self.progress.step, scalars(values))

    # ---- checkpoints ----

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
        """Make sure that nothing is being written any more when the block ends, however it ends."""
        try:
            yield
            self.finish_saving()
        finally:
            if self.saver is not None:
                self.saver.close()

    def save_when_due(self, every: int, interrupted: bool) -> None:
        """Write a checkpoint if it is time for one, or if a process was interrupted: then raises `Interrupted`."""
        stop = self.must_stop(interrupted)  # asked once: a later interrupt waits for the next step
        if stop or self.is_due(every):
            path = self.save()
            if stop:
                self.finish_saving()
                raise Interrupted(path)

    def save(self) -> Path:
        """Write a resumable checkpoint and remove those that are too old; its path.

        That of several processes is written while training goes on; see `ShardSaver.finish`.
        """
        if self.saver is not None:
            from olmoe.train.sharded_state import tensors_of, texts_of

            self.rest()
            path = state.checkpoint_path(self.output, self.progress)
            texts = texts_of(self.model, self.optimizer, self.progress, self.fingerprint, self.files)
            tensors = tensors_of(self.model, self.optimizer)
            self.saver.start(path, tensors, texts, then=lambda: state.prune(self.output, self.keep))
            return path
        path = state.save_state(self.output, self.model, self.optimizer, self.progress, self.fingerprint, self.files)
        state.prune(self.output, self.keep)
        return path

    def resume(self, newest: Path) -> None:
        """Continue from a checkpoint."""
        self.progress = self.restored(newest)
        log.info("resumed from %s", newest)
        if not self.ranks.on_first(lambda: state.has_best(self.output)):
            if self.progress.step < self.steps:  # or `ensure_best` says what takes its place
                log.warning("%s is missing; the best checkpoint from here on takes its place", self.best)
            self.progress.best, self.progress.best_step = float("inf"), 0

    def restored(self, newest: Path) -> state.Progress:
        """Weights, moments and counters as a checkpoint has them, of one process or of many."""
        restore = state.restore
        if is_sharded(newest):
            from olmoe.train.sharded_state import restore_shards as restore
        return self.ranks.on_all(lambda: restore(newest, self.model, self.optimizer, self.fingerprint))

    # ---- the best model ----

    @property
    def best(self) -> Path:
        """The folder of the best model."""
        return self.output / "best"

    def keep_best(self, score: float, is_measured: bool) -> None:
        """Write the model as the best one if its score says so, or if nothing is held out to measure it by."""
        if score < self.progress.best or not is_measured:
            self.progress.best, self.progress.best_step = score, self.progress.step
            self.export(overwrite=True)

    def ensure_best(self) -> None:
        """Let the last state be the best model if that was removed meanwhile, or before a finished run was resumed."""
        if not self.ranks.on_first(lambda: state.has_best(self.output)):
            log.warning("%s is missing; the last state takes its place", self.best)
            self.progress.best_step = self.progress.step
            self.export()

    def export(self, overwrite: bool = False) -> None:
        """Write the model as the best one."""
        if self.is_sharded:
            self.rest()
            export_sharded(self.model, self.best, self.ranks, self.files)
        else:
            export.save(self.model, self.best, extra_files=self.files, overwrite=overwrite)

    def load_best(self) -> None:
        """Let the model have the weights of the best one."""
        self.rest()
        self.ranks.on_all(lambda: load_weights(self.model, source_of(self.best, self.model)))


@contextmanager
def catch_interrupts(ranks: Ranks = ALONE) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the loop to act on between steps; a second one acts at once.

    Of several ranks none announces it: torchrun may have sent it because another has died, so that nothing is saved.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        restore()
        if ranks.size == 1:
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
