"""Train a model from a TOML configuration, or continue an interrupted run with --resume.

Several processes share a run that torchrun starts: torchrun --nproc-per-node 8 -m olmoe train CONFIG.toml
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe train`."""
    parser.add_argument("config", metavar="CONFIG.toml", help="see configs/ for examples")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.output from its last checkpoint")
    parser.add_argument(
        "--resume-or-start", action="store_true", help="continue it if it has a checkpoint, else start; for job queues"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start again if run.output holds a run, whose files are deleted"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Train; Ctrl-C finishes the step, saves, and says how to continue."""

    def load(resume: bool) -> Any:
        from olmoe.train.config import load_config

        return load_config(arguments.config, resume=resume)

    def loop() -> Callable[..., Path]:
        from olmoe.train.loop import train

        return train

    return launch(arguments, load, loop)


def launch(arguments: argparse.Namespace, load: Callable[[bool], Any], loop: Callable[[], Callable[..., Path]]) -> int:
    """Run what `loop` imports on the configuration that `load` reads, for a run that is resumed or not.

    Torchrun's restarts go on from the newest checkpoint, and of several processes one tells the user's mistakes.
    """
    from olmoe.cli.main import EXIT_USER_ERROR
    from olmoe.errors import UserError
    from olmoe.train.run_folder import latest

    if arguments.resume_or_start and (arguments.resume or arguments.overwrite):
        raise UserError("--resume-or-start decides by itself; leave out --resume and --overwrite.")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun, after a failure
    try:
        # Before torch is imported: mistakes are reported at once.
        config = load(arguments.resume or arguments.resume_or_start or restarted)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # one process on each machine tells it
            return EXIT_USER_ERROR
        raise
    resume, overwrite = arguments.resume, arguments.overwrite
    if arguments.resume_or_start or restarted:
        resume = latest(config.resolve(config.run.output)) is not None
        overwrite = restarted and not resume
    return follow(arguments, functools.partial(loop(), config), resume=resume, overwrite=overwrite)


def follow(arguments: argparse.Namespace, train: Callable[..., Path], *, resume: bool, overwrite: bool) -> int:
    """Train by the options of the command line, and print where the result is, or how to continue if interrupted."""
    from olmoe.cli.main import EXIT_INTERRUPTED, EXIT_USER_ERROR
    from olmoe.train.ranks import ToldByAnother
    from olmoe.train.run import Interrupted

    is_first = os.environ.get("RANK", "0") == "0"
    try:
        best = train(resume=resume, overwrite=overwrite, show_progress=not arguments.quiet)
    except ToldByAnother:
        return EXIT_USER_ERROR
    except Interrupted as interrupt:
        launcher = "torchrun ... -m " if "RANK" in os.environ else ""
        command = f"{launcher}olmoe {arguments.command} {arguments.config} --resume"
        if is_first:
            print(f"olmoe: interrupted; saved {interrupt.path}. Continue with: {command}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if is_first:
        print(best)
    return 0
