"""The loop of fine-tuning: what the training loop does, over a task that says what a step is.

Every step follows from the configuration, the data and the step's number, so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from olmoe.io.atomic import write_text
from olmoe.model import set_products
from olmoe.runtime import resolve_device
from olmoe.train import parallel, precision, state
from olmoe.train.finetune.answers import answer, prompt_of
from olmoe.train.finetune.config import FinetuneConfig, FinetuneOptimizer
from olmoe.train.finetune.start import Start, Trained, load_model, open_start, save_best, sharing
from olmoe.train.finetune.task import Config, Task
from olmoe.train.optim import build_optimizer, clip_gradients, groups
from olmoe.train.ranks import Ranks
from olmoe.train.run import BaseRun, catch_interrupts, opened
from olmoe.train.shards import whole_moments
from olmoe.train.step import check_finite
from olmoe.train.trackers import check_installed


@dataclass(kw_only=True)
class Run(BaseRun):
    """Everything that a run consists of between two steps."""

    config: FinetuneConfig
    start: Start
    task: Task[Any]
    trained: Trained

    def restored(self, newest: Path) -> state.Progress:
        """See `BaseRun.restored`. A checkpoint of adapters is the same for any number of ranks."""
        adapter = self.trained.adapter
        if adapter is None:
            return super().restored(newest)

        def read() -> state.Progress:
            progress, saved = state.read_state(newest, self.fingerprint)
            with state.one_sentence(newest):
                adapter.read(self.model, newest)
            state.restore_moments(self.optimizer, self.trained.parameters, saved)
            return progress

        return self.ranks.on_all(read)

    def save(self) -> Path:
        """See `BaseRun.save`."""
        files = self.trained.adapter
        if files is None:
            return super().save()
        self.rest()
        adapter, moments = files.collect(self.model), whole_moments(self.optimizer)

        def write() -> Path:
            path = state.save_state(
                self.output, self.model, moments, self.progress, self.fingerprint, self.files,
                lambda _, folder: files.write(adapter, folder),
            )  # fmt: skip
            state.prune(self.output, self.keep)
            return path

        return self.ranks.on_first(write)

    def export(self, overwrite: bool = False) -> None:
        """See `BaseRun.export`."""
        files = self.trained.adapter
        if files is None:
            return super().export(overwrite)
        self.rest()
        adapter = files.collect(self.model)
        return self.ranks.on_first(lambda: save_best(adapter, files, self.best, self.files))

    def load_best(self) -> None:
        """See `BaseRun.load_best`."""
        files = self.trained.adapter
        if files is None:
            return super().load_best()
        self.rest()
        return self.ranks.on_all(lambda: files.read(self.model, self.best))


def finetune(
    config: Config,
    command: str,
    make_task: Callable[[Config, Start, torch.device, Ranks], Task[Config]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Run (or continue) a fine-tuning run of that command and return the folder of its best checkpoint, or adapter.

    Writes into `run.output` what `train` writes there. Raises `UserError` for bad data or settings, and `Interrupted`
    after Ctrl-C.
    """
    with opened(config, resume, overwrite, group_of_one=config.compute.precision == "bf16") as (ranks, output, newest):
        show_progress = show_progress and ranks.is_first
        device = ranks.device(resolve_device(config.run.device))
        ranks.on_all(lambda: precision.check(config.compute, device))
        ranks.on_all(lambda: check_installed(config.log))
        start = ranks.first_in_turn(lambda: open_start(config))
        ranks.on_all(lambda: parallel.check(sharing(config, start.model_config), ranks, command))
        task = ranks.on_all(lambda: make_task(config, start, device, ranks))
        model, trained = load_model(start, config, device, ranks)
        precision.set_up(model, config.compute)
        is_sharded = parallel.is_parallel(sharing(config, start.model_config), ranks)
        run = Run(
            config=config, output=output, device=device, model=model, start=start, task=task, trained=trained,
            optimizer=_build_optimizer(trained, config.optimizer), files=start.files, steps=task.steps,
            fingerprint=config.fingerprint() | task.fingerprint(), keep=config.checkpoint.keep, ranks=ranks,
            is_sharded=is_sharded, saves_shards=is_sharded and trained.adapter is None,
        )  # fmt: skip
        with run.saving():
            _begin(run, newest, overwrite, show_progress)
            with run.tracking(config.log, config.fingerprint()):
                _train(run, show_progress)
            return _report_best(run)


def _begin(run: Run, newest: Path | None, overwrite: bool, show_progress: bool) -> None:
    """Set a run up as at its start, or as the checkpoint `newest` left it."""
    if overwrite:
        run.ranks.on_first(lambda: state.discard(run.output))
    if newest is not None:
        run.ranks.on_all(lambda: state.check_resumable(newest, run.fingerprint))
    # With the weights that the run starts with.
    run.task.prepare(run.model, run.output, newest is not None, show_progress)
    run.rest()
    if newest is not None:
        run.resume(newest)
    run.ranks.on_first(lambda: state.truncate_metrics(run.metrics_path, run.progress.step))


def _build_optimizer(trained: Trained, config: FinetuneOptimizer) -> torch.optim.Optimizer:
    if config.kind == "adamw":
        return build_optimizer(trained.parameters, config)
    return torch.optim.RMSprop(
        groups(trained.parameters), lr=config.learning_rate, eps=config.eps, weight_decay=config.weight_decay
    )


def _train(run: Run, show_progress: bool) -> None:
    bar = tqdm(total=run.steps, initial=run.progress.step, unit="step", disable=not show_progress)
    with catch_interrupts(run.ranks) as interrupted, bar, run.open_metrics() as metrics:
        if run.progress.step == 0:
            run.record(metrics, evaluate(run)[0])  # for comparison
        told: dict[str, str] = {}
        while run.progress.step < run.steps:
            values = advance(run)
            run.record(metrics, values)
            bar.update()
            told |= {"loss": f"{values['loss']:.3f}", "tok_s": f"{values['tokens_per_second']:.0f}"}
            bar.set_postfix(told)
            if run.is_due(run.config.evaluation.every_steps):
                measured, score = evaluate(run)
                run.record(metrics, measured)
                run.keep_best(score, is_measured=run.task.has_held_out)
                if run.task.has_held_out:
                    told["held_out"] = f"{score:.3f}"
                    bar.set_postfix(told)
            run.save_when_due(run.config.checkpoint.every_steps, bool(interrupted))


def advance(run: Run) -> dict[str, float]:
    """Train by one step; what it measured, by name."""
    started, config, progress = time.perf_counter(), run.config, run.progress
    rate = config.schedule.rate(config.optimizer.learning_rate, progress.step, run.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    values = run.task.accumulate(run.model, progress.step)
    clip = parallel.clip_across(run.ranks, config.parallel.replicate) if run.is_sharded else clip_gradients
    norm = float(clip(run.trained.parameters, config.optimizer.max_grad_norm))
    check_finite("gradient norm", norm, progress.step + 1, config)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.tokens += int(values["tokens"])
    values["step_tokens"] = values.pop("tokens")
    speed = values["step_tokens"] / (time.perf_counter() - started)
    return values | {"learning_rate": rate, "grad_norm": norm, "tokens_per_second": speed}


def evaluate(run: Run) -> tuple[dict[str, Any], float]:
    """Measures and answers on held-out data, and the score that decides which checkpoint is best (low is good)."""
    config = run.config.evaluation
    run.model.eval()
    measured, score = run.task.evaluate(run.model, config.samples)
    if run.task.has_held_out:
        check_finite("held-out loss", score, run.progress.step, run.config)
    answers = []
    for sample in run.task.prompts[: config.answers]:
        text, ids = prompt_of(sample, run.start.tokenizer)
        given = answer(run.model, run.start.tokenizer, ids, config.answer_tokens, run.ranks)
        answers.append({"prompt": text, "answer": given})
    run.model.train()
    return measured | ({"answers": answers} if answers else {}), score


def _report_best(run: Run) -> Path:
    """Evaluate the best checkpoint on all that is held out, into `evaluation.json`; its folder."""
    run.ensure_best()
    run.load_best()
    set_products(run.model, None)  # as for anyone who opens the checkpoint
    run.model.eval()
    measured, _ = run.task.evaluate(run.model, 0)
    report = json.dumps({"step": run.progress.best_step} | measured) + "\n"
    run.ranks.on_first(lambda: write_text(run.output / "evaluation.json", report))
    return run.best
