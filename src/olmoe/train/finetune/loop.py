"""The loop of fine-tuning: what the training loop does, over a task that says what a step is.

Every step follows from the configuration, the data and the step's number, so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from tqdm import tqdm

from olmoe.io.atomic import write_text
from olmoe.model import CausalLM
from olmoe.runtime import keep_freed_memory, log, resolve_device, set_threads
from olmoe.train import state
from olmoe.train.finetune.answers import answer, prompt_of
from olmoe.train.finetune.chats import Sample
from olmoe.train.finetune.config import FinetuneConfig, FinetuneOptimizer
from olmoe.train.finetune.start import Start, Trained, load_model, open_start, save_best
from olmoe.train.inheritance import check_start_stays
from olmoe.train.loop import Interrupted, catch_interrupts
from olmoe.train.optim import build_optimizer, clip_gradients
from olmoe.train.run_folder import run_lock
from olmoe.train.step import check_finite


class Task(Protocol):
    """What is learned, and from what data."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    @property
    def prompts(self) -> list[Sample]:
        """Held-out samples whose prompts are answered for the log."""
        ...

    @property
    def has_held_out(self) -> bool:
        """Whether there is data to choose the best checkpoint by."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """The contents of the data, which must not change during a run."""
        ...

    def prepare(self, model: CausalLM, output: Path, resumed: bool, show_progress: bool) -> None:
        """Compute what the task needs from the model before training, or find it in `output` if a run is `resumed`."""
        ...

    def accumulate(self, model: CausalLM, step: int) -> dict[str, float]:
        """Add the gradients of a step, counted from 0, and return what it measured; `tokens` among it."""
        ...

    def evaluate(self, model: CausalLM, samples: int) -> tuple[dict[str, Any], float]:
        """Measures by name, and the score (lower is better), on this many samples of each file (0: all)."""
        ...


@dataclass
class Run:
    """The whole state of a run between two steps."""

    config: FinetuneConfig
    output: Path
    start: Start
    task: Task
    model: CausalLM
    trained: Trained
    optimizer: torch.optim.Optimizer
    progress: state.Progress
    fingerprint: dict[str, Any]

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one."""
        return self.progress.step == self.task.steps or self.progress.step % every == 0

    def record(self, metrics: TextIO, values: Mapping[str, Any]) -> None:
        """Write one record of the step that was finished last."""
        counters = {"step": self.progress.step, "tokens": self.progress.tokens}
        metrics.write(json.dumps(counters | dict(values), ensure_ascii=False) + "\n")
        metrics.flush()


def finetune(
    config: FinetuneConfig,
    make_task: Callable[[Start, torch.device], Task],
    *,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Run (or continue) a fine-tuning run and return the folder of its best checkpoint, or adapter.

    Writes into `run.output` what `train` writes there. Raises `UserError` for bad data or settings, and `Interrupted`
    after Ctrl-C.
    """
    output = config.resolve(config.run.output)
    if overwrite:
        check_start_stays(config.start, config.resolve(config.start), output)
    if not output.is_dir():
        state.begin(output, resume, overwrite)  # makes it, or refuses
    with run_lock(output):
        newest = state.begin(output, resume, overwrite)
        set_threads(config.run.threads)
        keep_freed_memory()
        run = open_run(config, make_task, output, newest, overwrite, show_progress)
        return _train(run, show_progress)


def open_run(
    config: FinetuneConfig,
    make_task: Callable[[Start, torch.device], Task],
    output: Path,
    newest: Path | None,
    overwrite: bool,
    show_progress: bool,
) -> Run:
    """Data, model and optimizer as at the start of the run, or as the checkpoint `newest` left them."""
    device = resolve_device(config.run.device)
    start = open_start(config)
    task = make_task(start, device)
    model, trained = load_model(start, config, device)
    optimizer = _build_optimizer(trained, config.optimizer)
    fingerprint = config.fingerprint() | task.fingerprint()
    run = Run(config, output, start, task, model, trained, optimizer, state.Progress(), fingerprint)
    if overwrite:
        state.discard(output)
    if newest is not None:
        run.progress, moments = state.read_state(newest, fingerprint)
    task.prepare(model, output, newest is not None, show_progress)  # with the weights that the run began with
    if newest is not None:
        with state.one_sentence(newest):
            trained.read(model, newest)
        optimizer.load_state_dict(moments)
        log.info("resumed from %s", newest)
        if not state.has_best(output):
            log.warning("%s is missing; the best checkpoint from here on takes its place", output / "best")
            run.progress.best, run.progress.best_step = float("inf"), 0
    state.truncate_metrics(output / "metrics.jsonl", run.progress.step)
    return run


def _build_optimizer(trained: Trained, config: FinetuneOptimizer) -> torch.optim.Optimizer:
    if config.kind == "adamw":
        return build_optimizer(trained.parameters, config)
    return torch.optim.RMSprop(
        trained.parameters, lr=config.learning_rate, eps=config.eps, weight_decay=config.weight_decay
    )


def _train(run: Run, show_progress: bool) -> Path:
    every = run.config.evaluation.every_steps
    bar = tqdm(total=run.task.steps, initial=run.progress.step, unit="step", disable=not show_progress)
    with catch_interrupts() as interrupted, bar, (run.output / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        if run.progress.step == 0:
            run.record(metrics, evaluate(run)[0])  # what the run is to be compared with
        while run.progress.step < run.task.steps:
            values = advance(run)
            run.record(metrics, values)
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}")
            if run.is_due(every):
                measured, score = evaluate(run)
                run.record(metrics, measured)
                _keep_best(run, score)
            stop = bool(interrupted)  # asked once: what comes later waits for the next step
            if stop or run.is_due(run.config.checkpoint.every_steps):
                path = save(run)
                if stop:
                    raise Interrupted(path)
    return _report_best(run)


def advance(run: Run) -> dict[str, float]:
    """Train by one step; what it measured, by name."""
    started, config, progress = time.perf_counter(), run.config, run.progress
    rate = config.schedule.rate(config.optimizer.learning_rate, progress.step, run.task.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    values = run.task.accumulate(run.model, progress.step)
    norm = float(clip_gradients(run.trained.parameters, config.optimizer.max_grad_norm))
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
        given = answer(run.model, run.start.tokenizer, ids, config.answer_tokens)
        answers.append({"prompt": text, "answer": given})
    run.model.train()
    return measured | ({"answers": answers} if answers else {}), score


def save(run: Run) -> Path:
    """Write a resumable checkpoint and remove those that are too old; its path."""
    path = state.save_state(
        run.output, run.model, run.optimizer, run.progress, run.fingerprint, run.start.files, run.trained.write
    )
    state.prune(run.output, run.config.checkpoint.keep)
    return path


def _keep_best(run: Run, score: float) -> None:
    """Save the model as the best one if its score says so, or if nothing is held out."""
    if score < run.progress.best or not run.task.has_held_out:
        run.progress.best, run.progress.best_step = score, run.progress.step
        save_best(run.model, run.trained, run.output / "best", run.start.files)


def _report_best(run: Run) -> Path:
    """Evaluate the best checkpoint on all that is held out, into `evaluation.json`; its folder."""
    best = run.output / "best"
    if not state.has_best(run.output):  # removed in the meantime, or before a finished run was resumed
        log.warning("%s is missing; the last state takes its place", best)
        run.progress.best_step = run.progress.step
        save_best(run.model, run.trained, best, run.start.files)
    run.trained.read(run.model, best)
    run.model.eval()
    measured, _ = run.task.evaluate(run.model, 0)
    write_text(run.output / "evaluation.json", json.dumps({"step": run.progress.best_step} | measured) + "\n")
    return best
