"""The training loop, readable top to bottom: a run is opened, advanced step by step, evaluated and saved.

Each of these is a function over a `Run`, which other loops (of several processes) can call.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from olmoe.errors import ConfigError
from olmoe.io.atomic import write_text
from olmoe.model import CausalLM, initialize, set_products
from olmoe.runtime import log, resolve_device
from olmoe.train import parallel, precision, shared_expert, state
from olmoe.train.config import TrainConfig
from olmoe.train.evaluation import Evaluation, evaluate_all, summary
from olmoe.train.inheritance import start_folder
from olmoe.train.optim import build_optimizer, clip_gradients
from olmoe.train.ranks import ALONE, Ranks
from olmoe.train.run import BaseRun, Interrupted, catch_interrupts, opened
from olmoe.train.run_data import RunData, open_data
from olmoe.train.shards import assign, load_weights
from olmoe.train.skipping import StepFilter
from olmoe.train.step import Scales, check_finite, microbatches, train_step
from olmoe.train.throughput import Throughput
from olmoe.train.trackers import check_installed
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.names import EMBEDDING, HEAD, parameter_shapes

__all__ = ["Interrupted", "Run", "advance", "catch_interrupts", "evaluate_held_out", "open_run", "report_best", "train"]

CPU = torch.device("cpu")


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True) -> Path:
    """Run (or continue) a training run and return the folder of its best checkpoint.

    An existing run is refused unless it is to `resume`, or to `overwrite`: then what it wrote is deleted first.

    Writes under `run.output`: `metrics.jsonl`, `checkpoints/step-N` (resumable), `best` (lowest mean held-out
    bits per byte; the last state if nothing is held out) and `evaluation.json` (every held-out file, all of it or
    `evaluation.final_windows`, by the best checkpoint). Raises `UserError` for bad data or settings, and `Interrupted`
    after Ctrl-C.
    """
    with opened(config, resume, overwrite, group_of_one=config.compute.precision == "bf16") as (ranks, output, newest):
        return _train(config, output, newest, overwrite, show_progress and ranks.is_first, ranks)


def _train(
    config: TrainConfig, output: Path, newest: Path | None, overwrite: bool, show_progress: bool, ranks: Ranks
) -> Path:
    ranks.on_all(lambda: check_installed(config.log))
    run = open_run(config, output, newest, overwrite, ranks)
    bar = tqdm(
        total=run.config.total_steps * run.config.tokens_per_step,
        initial=run.progress.tokens,
        unit="tok",
        unit_scale=True,
        disable=not show_progress,
    )
    tracking = run.tracking(run.config.log, run.config.fingerprint())
    with catch_interrupts(ranks) as interrupted, tracking, run.saving(), bar, run.open_metrics() as metrics:
        told: dict[str, str] = {}
        while run.progress.step < run.config.total_steps:
            values = advance(run)
            run.record(metrics, values)
            bar.update(run.config.tokens_per_step)
            told |= {"loss": f"{values['cross_entropy']:.3f}", "tok_s": f"{values['tokens_per_second']:.0f}"}
            bar.set_postfix(told)
            if run.is_due(run.config.evaluation.every_steps):
                results, score = evaluate_held_out(run)
                run.record(metrics, summary(results))
                run.keep_best(score, is_measured=bool(run.data.held_out))
                if results:
                    told["held_out"] = f"{statistics.fmean(r.loss for r in results.values()):.3f}"
                    bar.set_postfix(told)
            run.save_when_due(run.config.checkpoint.every_steps, bool(interrupted))
    return report_best(run)


@dataclass(kw_only=True)
class Run(BaseRun):
    """The whole state of a training run between two steps."""

    config: TrainConfig
    data: RunData
    filter: StepFilter = field(init=False)

    @cached_property
    def throughput(self) -> Throughput:
        """The reference that the speed of a step is compared with."""
        config, shared = self.config, shared_expert.parameters(self.config)
        return Throughput.of(config.model, self.device, config.run.peak_flops, self.ranks, shared)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.config.data.sequence_length


def open_run(
    config: TrainConfig, output: Path, newest: Path | None, overwrite: bool = False, ranks: Ranks = ALONE
) -> Run:
    """Data, model and optimizer as at the start of the run, or as the checkpoint `newest` left them.

    With `overwrite`, what an older run wrote into `output` is deleted, but not before all that the new one needs was
    read.
    """
    device = ranks.device(resolve_device(config.run.device))
    ranks.on_all(lambda: parallel.check(config, ranks))
    ranks.on_all(lambda: shared_expert.check(config, parallel.is_parallel(config, ranks)))
    ranks.on_all(lambda: precision.check(config.compute, device))
    config, data = ranks.first_in_turn(lambda: open_data(config, state.recorded_names(newest)))
    model = _start(config, resumed=newest is not None, device=device, ranks=ranks)
    optimizer = build_optimizer(model, config.optimizer)
    sharded = parallel.is_parallel(config, ranks)
    run = Run(
        config=config, output=output, device=device, data=data, model=model, optimizer=optimizer, ranks=ranks,
        fingerprint=config.fingerprint() | data.fingerprint(), files=data.tokenizer_files, steps=config.total_steps,
        keep=config.checkpoint.keep, is_sharded=sharded, saves_shards=sharded,
    )  # fmt: skip
    if overwrite:
        ranks.on_first(lambda: state.discard(output))
    if newest is not None:
        run.resume(newest)
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
    results = evaluate_all(
        run.model, run.data.held_out, run.length, run.config.evaluation.windows, run.ranks, run.config.mask_eos_id
    )
    score = _score(results)
    if results:
        check_finite("held-out loss", score, run.progress.step, run.config)
    return results, score


def report_best(run: Run) -> Path:
    """Evaluate the best checkpoint on every held-out and measured file into `evaluation.json`; its folder."""
    run.ensure_best()
    run.load_best()
    set_products(run.model, None)  # as for anyone who opens the checkpoint
    files = run.data.held_out + run.data.measured
    windows = run.config.evaluation.final_windows
    final = evaluate_all(run.model, files, run.length, windows, run.ranks, run.config.mask_eos_id)
    report: dict[str, Any] = {"step": run.progress.best_step} | summary(final)
    report["expert_load_LE"] = {name: r.counts_LE.tolist() for name, r in final.items()}
    run.ranks.on_first(lambda: write_text(run.output / "evaluation.json", json.dumps(report) + "\n"))
    return run.best


def _start(config: TrainConfig, *, resumed: bool, device: torch.device = CPU, ranks: Ranks = ALONE) -> CausalLM:
    """The model at the start of the run: random, or with the weights of the checkpoint that the configuration names.

    One that is `resumed` gets its weights with the rest of the state.
    """
    if parallel.is_parallel(config, ranks):
        from olmoe.train.sharding import build_parallel

        model = build_parallel(config, ranks, device)
        precision.set_up(model, config.compute)
        if not resumed:
            ranks.on_all(lambda: _fill(model, config, assign))
        return model
    model = CausalLM(config.model)
    if config.shared_expert.width:
        shared_expert.add(model, config.shared_expert.width)
    precision.set_up(model, config.compute)
    if not resumed:
        _fill(model, config)
    for layer in model.model.layers:
        parallel.arrange(layer, config)
    return model.to(device)


def _fill(
    model: CausalLM, config: TrainConfig, place: Callable[[torch.nn.Parameter, torch.Tensor], None] | None = None
) -> None:
    """Give a model its initial weights. Raises `ConfigError` for a checkpoint that does not have them."""
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
