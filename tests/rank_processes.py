"""Processes that train together, as torchrun would start them, for tests of `olmoe.train` on several ranks.

A module of its own because processes import their functions by name. They are forked from a server that has imported
everything once, so that a world of four ranks starts in a second.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # FSDP imports it, for seconds

from olmoe.train import loop
from olmoe.train.config import load_config
from olmoe.train.finetune import loop as finetuning
from olmoe.train.finetune.config import PreferenceConfig, SFTConfig
from olmoe.train.finetune.config import load_config as load_finetuning
from olmoe.train.finetune.dpo import dpo
from olmoe.train.finetune.sft import sft
from olmoe.train.loop import Interrupted, train
from ports import kept_port

_TIMEOUT = 300  # for the compiler on a busy machine


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in names.items()}


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work` returns on each of so many ranks; an exception of any is raised here."""
    with kept_port() as port, ProcessPoolExecutor(ranks, mp_context=_server()) as pool:
        futures = [pool.submit(_on_rank, rank_environment(r, ranks, port), work, *arguments) for r in range(ranks)]
        return [future.result(_TIMEOUT) for future in futures]


def ends_on_ranks(folder: Path, ranks: int, work: Callable[..., Any], *arguments: Any) -> list[str]:
    """The type of what ends each rank's process, which is gone for the others when it ends; "killed" if nothing did."""
    with kept_port() as port:
        processes = [
            _server().Process(
                target=_end, args=(folder / f"end-{r}", rank_environment(r, ranks, port), work, *arguments)
            )
            for r in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_TIMEOUT)
            process.kill()
    ends = [folder / f"end-{r}" for r in range(ranks)]
    return [end.read_text() if end.exists() else "killed" for end in ends]


def _end(file: Path, environment: dict[str, str], work: Callable[..., Any], *arguments: Any) -> None:
    found = _on_rank(environment, error_of, work, *arguments)
    file.write_text(str(found and found[0]))


@functools.cache
def _server():
    """The context whose server of forks has imported this module, as it finds only by PYTHONPATH."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_processes"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _on_rank(environment: dict[str, str], work: Callable[..., Any], *arguments: Any) -> Any:
    os.environ.update(environment)
    torch.set_num_threads(1)
    return work(*arguments)


def train_run(path: Path, resume: bool = False) -> None:
    """Train the run that a file describes, to its end."""
    train(load_config(path, resume=resume), resume=resume, show_progress=False)


def train_until(path: Path, step: int, on_rank: int, number: int, resume: bool = False) -> str:
    """Train until one rank gets a signal in the middle of a step; the name of the checkpoint that is left."""
    original = loop.train_step

    def train_step(*arguments: Any, **options: Any) -> Any:
        report = original(*arguments, **options)
        steps = arguments[5] // arguments[4].tokens_per_step + 1
        if steps == step and int(os.environ.get("RANK", "0")) == on_rank:
            signal.raise_signal(number)
        return report

    with mock.patch.object(loop, "train_step", train_step):
        return _saved_by_interrupt(train_run, path, resume)


def finetune_run(path: Path, command: str, resume: bool = False) -> None:
    """Run `olmoe sft` or `olmoe dpo` of the configuration in a file, to its end."""
    kind, run = {"sft": (SFTConfig, sft), "dpo": (PreferenceConfig, dpo)}[command]
    run(load_finetuning(path, kind), resume=resume, show_progress=False)


def finetune_until(path: Path, command: str, step: int, on_rank: int, number: int) -> str:
    """Fine-tune until one rank gets a signal in the middle of a step; the name of the checkpoint that is left."""
    original = finetuning.advance

    def advance(run: Any) -> Any:
        if run.progress.step + 1 == step and run.ranks.rank == on_rank:
            signal.raise_signal(number)
        return original(run)

    with mock.patch.object(finetuning, "advance", advance):
        return _saved_by_interrupt(finetune_run, path, command)


def _saved_by_interrupt(run: Callable[..., None], *arguments: Any) -> str:
    """Run until the signal; the name of the checkpoint that it leaves."""
    try:
        run(*arguments)
    except Interrupted as interrupt:
        return interrupt.path.name
    raise AssertionError("the run was not interrupted")


def error_of(work: Callable[..., Any], *arguments: Any) -> tuple[str, str] | None:
    """The type and text of what `work` raises."""
    try:
        work(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None
