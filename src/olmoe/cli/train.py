"""Train a model from a TOML configuration, or continue an interrupted run with --resume."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe train`."""
    parser.add_argument("config", metavar="CONFIG.toml", help="see configs/ for examples")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.output from its last checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew where run.output holds a run, whose files are deleted"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Train; Ctrl-C finishes the step, saves, and says how to go on."""
    from olmoe.train.config import load_config

    config = load_config(arguments.config, resume=arguments.resume)  # before torch is imported: mistakes answer at once
    from olmoe.train.loop import train

    return follow(arguments, functools.partial(train, config))


def follow(arguments: argparse.Namespace, train: Callable[..., Path]) -> int:
    """Train by the options of the command line, and print where the result is, or how an interrupted run goes on."""
    from olmoe.cli.main import EXIT_INTERRUPTED
    from olmoe.train.loop import Interrupted

    try:
        best = train(resume=arguments.resume, overwrite=arguments.overwrite, show_progress=not arguments.quiet)
    except Interrupted as interrupt:
        again = f"olmoe {arguments.command} {arguments.config} --resume"
        print(f"olmoe: interrupted; saved {interrupt.path}. Continue with: {again}", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(best)
    return 0
