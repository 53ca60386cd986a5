"""The training loop, readable top to bottom: data, model, steps, evaluation, checkpoints."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from olmoe.errors import ConfigError
from olmoe.io.atomic import write_text
from olmoe.io.text_file import read_text
from olmoe.model import CausalLM, initialize
from olmoe.runtime import keep_freed_memory, log, resolve_device, set_threads
from olmoe.tokenizer import Tokenizer
from olmoe.train import state
from olmoe.train.config import TrainConfig
from olmoe.train.data import (
    Mixture,
    TokenFile,
    Tokens,
    is_token_file,
    open_tokens,
    plain_text,
    read_documents,
    sample_sha256,
    sha256,
)
from olmoe.train.dropout import residual_dropout
from olmoe.train.evaluation import Evaluation, evaluate
from olmoe.train.inheritance import derive_eos, start_folder
from olmoe.train.losses import objective
from olmoe.train.optim import build_optimizer, clip_gradients, learning_rate
from olmoe.train.run_folder import run_lock
from olmoe.train.sources import SourceFiles, find_files, names_of, open_sources, prepare_files
from olmoe.train.vocabulary import train_vocabulary
from olmoe.weights import checkpoint, packed


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
    if overwrite and start and output.resolve() in start_folder(start, config.resolve(start)).resolve().parents:
        raise ConfigError(
            f"run.initialize_from {start!r} lies in run.output, which --overwrite would empty; choose another output."
        )
    if not output.is_dir():
        state.begin(output, resume, overwrite)  # makes it, or refuses
    with run_lock(output):
        return _train(config, output, state.begin(output, resume, overwrite), overwrite, show_progress)


def _train(config: TrainConfig, output: Path, newest: Path | None, overwrite: bool, show_progress: bool) -> Path:
    set_threads(config.run.threads)
    keep_freed_memory()
    device = resolve_device(config.run.device)

    # ---- data: text -> token files -> one deterministic sequence of windows ----
    groups = find_files(config)
    names = names_of(groups, state.recorded_names(newest))
    tokenizer_path = config.resolve(config.tokenizer.path)
    _ensure_tokenizer(config, tokenizer_path, groups["train"])
    if not config.eos_is_written:
        config = replace(config, model=derive_eos(tokenizer_path, config.model))
    eos_id = _eos_id(config, tokenizer_path)
    tokens_folder, vocab_size = config.resolve(config.data.tokens_folder), config.model.vocab_size
    prepared = {
        group: prepare_files(files, tokenizer_path, tokens_folder, eos_id, names) for group, files in groups.items()
    }
    train_files, valid_files, measured_files = (list(chain.from_iterable(prepared[group])) for group in groups)
    length = config.data.sequence_length
    streams = open_sources(groups["train"], prepared["train"], vocab_size, length)
    mixture = Mixture(streams, length, config.run.seed)
    held_out = [(file, open_tokens(file, vocab_size)) for file in valid_files]
    measured = [(file, open_tokens(file, vocab_size)) for file in measured_files]

    # ---- model, optimizer, state ----
    model = _start(config, resumed=newest is not None).to(device)
    optimizer = build_optimizer(model, config.optimizer)
    progress = state.Progress()
    fingerprint = config.fingerprint() | {
        "texts": {file.name: file.source_sha256 or file.tokens for file in train_files + valid_files},
        "templates": {file.name: file.template_sha256 for file in train_files + valid_files if file.template_sha256},
        "token_samples": {f.name: sample_sha256(f) for f in train_files + valid_files if not f.source_sha256},
        "measured": [file.name for file in measured_files],
        "tokenizer": sha256(tokenizer_path),
    }
    if overwrite:  # not before all that the new run needs was read
        state.discard(output)
    if newest is not None:
        progress = state.restore(newest, model, optimizer, fingerprint)
        log.info("resumed from %s", newest)
        if not state.has_best(output):
            log.warning("%s is missing; the best checkpoint from here on takes its place", output / "best")
            progress.best, progress.best_step = float("inf"), 0
    metrics_path = output / "metrics.jsonl"
    state.truncate_metrics(metrics_path, progress.step)
    tokenizer_files = _tokenizer_files(config, tokenizer_path)
    epoch_tokens = mixture.windows_per_epoch * length
    log.info("%.1fM tokens an epoch, %d steps", epoch_tokens / 1e6, config.total_steps)

    microbatches, sequences = config.batch.accumulation, config.batch.sequences
    bar = tqdm(
        total=config.total_steps * config.tokens_per_step,
        initial=progress.tokens,
        unit="tok",
        unit_scale=True,
        disable=not show_progress,
    )
    with _catch_interrupts() as interrupted, bar, metrics_path.open("a", encoding="utf-8") as metrics:

        def record(**values: Any) -> None:
            metrics.write(json.dumps({"step": progress.step, "tokens": progress.tokens} | values) + "\n")
            metrics.flush()

        while progress.step < config.total_steps:
            started = time.perf_counter()
            rate = learning_rate(config.schedule, config.optimizer.learning_rate, progress.tokens)
            for group in optimizer.param_groups:
                group["lr"] = rate

            # ---- one step ----
            sums = dict.fromkeys(("cross_entropy", "load_balancing", "router_z"), 0.0)
            counts_LE = torch.zeros(0)
            for microbatch in range(microbatches):
                first = (progress.step * microbatches + microbatch) * sequences
                windows = np.stack([mixture.window(i) for i in range(first, first + sequences)])
                with residual_dropout(model, config.regularization.residual_dropout, config.run.seed + first):
                    losses = objective(
                        model,
                        torch.from_numpy(windows).to(device),
                        config.loss,
                        positions_in_step=config.tokens_per_step,
                        microbatches=microbatches,
                    )
                losses.objective.backward()
                sums["cross_entropy"] += float(losses.cross_entropy)
                sums["load_balancing"] += float(losses.load_balancing) / microbatches
                sums["router_z"] += float(losses.router_z) / microbatches
                counts_LE = losses.counts_LE if microbatch == 0 else counts_LE + losses.counts_LE
            norm = float(clip_gradients(model.parameters(), config.optimizer.max_grad_norm))
            _check_finite("gradient norm", norm, progress.step + 1, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += config.tokens_per_step

            seconds = time.perf_counter() - started
            imbalance = float((counts_LE.amax(dim=1) / counts_LE.float().mean(dim=1)).mean())
            record(
                **sums,
                learning_rate=rate,
                grad_norm=norm,
                max_load_over_mean=imbalance,
                tokens_per_second=config.tokens_per_step / seconds,
            )
            bar.update(config.tokens_per_step)
            bar.set_postfix(loss=f"{sums['cross_entropy']:.3f}", tok_s=f"{config.tokens_per_step / seconds:.0f}")

            # ---- held-out evaluation, checkpoints, interrupts ----
            last = progress.step == config.total_steps
            if last or progress.step % config.evaluation.every_steps == 0:
                results = evaluate_all(model, held_out, length, config.evaluation.windows)
                score = _score(results)
                if results:
                    _check_finite("held-out loss", score, progress.step, config)
                record(**summary(results))
                if score < progress.best or not results:
                    progress.best, progress.best_step = score, progress.step
                    checkpoint.save(model, output / "best", extra_files=tokenizer_files, overwrite=True)
            stop = bool(interrupted)  # asked once: what comes later waits for the next step
            if last or stop or progress.step % config.checkpoint.every_steps == 0:
                path = state.save_state(output, model, optimizer, progress, fingerprint, tokenizer_files)
                state.prune(output, config.checkpoint.keep)
                if stop:
                    raise Interrupted(path)

    # ---- the best checkpoint on all of every held-out and measured file ----
    if not state.has_best(output):  # removed meanwhile, or before a finished run was resumed
        log.warning("%s is missing; the last state takes its place", output / "best")
        progress.best_step = progress.step
        checkpoint.save(model, output / "best", extra_files=tokenizer_files)
    best = checkpoint.load(output / "best", device=device)
    final = evaluate_all(best, held_out + measured, length, 0)
    report: dict[str, Any] = {"step": progress.best_step} | summary(final)
    report["expert_load_LE"] = {name: r.counts_LE.tolist() for name, r in final.items()}
    write_text(output / "evaluation.json", json.dumps(report) + "\n")
    return output / "best"


def _start(config: TrainConfig, *, resumed: bool) -> CausalLM:
    """The model as the run begins: random, or with the weights of the checkpoint that the configuration names."""
    model = CausalLM(config.model)
    if resumed:
        return model  # its weights come with the rest of the state
    if config.run.initialize_from is None:
        initialize(model, config.run.seed)
        return model
    folder = start_folder(config.run.initialize_from, config.resolve(config.run.initialize_from))
    if packed.is_packed(folder):
        raise ConfigError(
            f"run.initialize_from {str(folder)!r} is a packed checkpoint, whose weights are rounded; give the one that "
            "it was packed from."
        )
    weights = checkpoint.load(folder, dtype=torch.float32).state_dict()
    for name, parameter in model.state_dict().items():
        if name not in weights or weights[name].shape != parameter.shape:
            found = "is not there" if name not in weights else f"has the shape {list(weights[name].shape)}"
            raise ConfigError(
                f"run.initialize_from {str(folder)!r} does not fit [model]: {name} {found}, "
                f"where {list(parameter.shape)} is described."
            )
    model.load_state_dict(weights)
    return model


def evaluate_all(
    model: CausalLM, held_out: list[tuple[TokenFile, Tokens]], length: int, windows: int
) -> dict[str, Evaluation]:
    """`evaluate` each held-out file; results by the file's name."""
    return {file.name: evaluate(model, file, tokens, length, windows) for file, tokens in held_out}


def summary(results: dict[str, Evaluation]) -> dict[str, dict[str, float | None]]:
    """Loss and bits per byte by file, as metrics records hold them; null for bits of unknown bytes."""
    bits = {name: r.bits_per_byte for name, r in results.items()}
    return {
        "held_out_loss": {name: round(r.loss, 5) for name, r in results.items()},
        "bits_per_byte": {name: round(b, 5) if np.isfinite(b) else None for name, b in bits.items()},
    }


def _score(results: dict[str, Evaluation]) -> float:
    """What `best` minimises: the mean over files of bits per byte, or of the loss where bytes are unknown."""
    if not results:
        return float("inf")
    bits = statistics.fmean(r.bits_per_byte for r in results.values())
    return bits if np.isfinite(bits) else statistics.fmean(r.loss for r in results.values())


def _check_finite(what: str, value: float, step: int, config: TrainConfig) -> None:
    if not np.isfinite(value):
        raise ConfigError(
            f"The {what} is {value} at step {step}; lower optimizer.learning_rate "
            f"(now {config.optimizer.learning_rate})."
        )


def _ensure_tokenizer(config: TrainConfig, path: Path, files: list[SourceFiles]) -> None:
    """Train the tokenizer on the training texts if its file does not exist and a size is given."""
    if path.is_file():
        return
    if config.tokenizer.vocab_size is None:
        raise ConfigError(f"There is no tokenizer {path}; set tokenizer.vocab_size to train one.")
    texts = [path for found in files for path in found.paths if not is_token_file(path, found.source.dtype)]
    log.info("training a tokenizer of %d entries on %d files", config.tokenizer.vocab_size, len(texts))
    train_vocabulary(
        (plain_text(document) for text in texts for document in read_documents(text)), config.tokenizer.vocab_size, path
    )


def _tokenizer_files(config: TrainConfig, path: Path) -> dict[str, str]:
    """What the run's checkpoints hold of the tokenizer: its file, and how transformers is to read it."""
    files = {"tokenizer.json": read_text(path)}
    if path.name == "tokenizer.json":
        beside = (path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja"))
        files |= {other.name: read_text(other) for other in beside if other.is_file()}
    if "tokenizer_config.json" not in files:
        ids = {"eos_ids": config.model.eos_token_ids, "pad_id": config.model.pad_token_id}
        tokenizer = Tokenizer.from_file(path, chat_template=files.get("chat_template.jinja"), **ids)
        files["tokenizer_config.json"] = tokenizer.transformers_config(config.model.max_position_embeddings)
    return files


def _eos_id(config: TrainConfig, tokenizer_path: Path) -> int:
    """The id that ends documents. Raises `ConfigError` if tokenizer and model do not fit each other."""
    size = Tokenizer.from_file(tokenizer_path).vocab_size
    if size != (config.tokenizer.vocab_size or size):
        raise ConfigError(
            f"{tokenizer_path} has {size} ids, but tokenizer.vocab_size is {config.tokenizer.vocab_size}; "
            f"set that to {size}, or remove the file to train one anew."
        )
    if size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer has {size} ids, but model.vocab_size is only {config.model.vocab_size}; raise it."
        )
    if config.model.eos_token_ids[0] >= size:
        raise ConfigError(
            f"model.eos_token_id {config.model.eos_token_ids[0]} is no id of {tokenizer_path} ({size} ids)."
        )
    return config.model.eos_token_ids[0]


@contextmanager
def _catch_interrupts() -> Iterator[list[int]]:
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
        except ValueError:  # not the main thread: whoever runs us handles signals
            break
    try:
        yield received
    finally:
        restore()
