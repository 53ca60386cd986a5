"""Draw a training run as one HTML page: losses, learning rate, expert load, speed; even while it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

_LEAST_SECONDS = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe plot`."""
    parser.add_argument("run", metavar="RUN", help="the folder that a run writes into, or its metrics.jsonl")
    parser.add_argument(
        "--output", metavar="FILE", help="where the page goes (default: training.html in the run's folder)"
    )
    parser.add_argument(
        "--follow", metavar="SECONDS", nargs="?", type=float, const=30.0,
        help="redraw it every S seconds (30) until the run has ended; a browser reloads it by itself",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Draw, and keep drawing if the run is to be followed."""
    import time

    from olmoe.analysis.drawing import require_matplotlib
    from olmoe.analysis.training import metrics_path, read_curves
    from olmoe.analysis.training_page import training_page
    from olmoe.errors import UserError
    from olmoe.io.atomic import write_text

    every = arguments.follow
    if every is not None and not _LEAST_SECONDS <= every < 1e6:
        raise UserError(f"--follow takes at least {_LEAST_SECONDS:g} second, not {every:g}.")
    require_matplotlib()
    metrics = metrics_path(arguments.run)
    output = Path(arguments.output).expanduser() if arguments.output else metrics.with_name("training.html")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(
            f"--output {str(output)!r} is a folder, or its folder does not exist; name a file in a folder that exists."
        )
    told = False
    while True:
        goes_on = every is not None and not _has_ended(metrics)  # before reading, so that its last steps are drawn
        begun = metrics.is_file() and metrics.stat().st_size > 0
        if goes_on and not begun and Path(arguments.run).expanduser().is_dir():
            time.sleep(every)  # its first step is not done yet
            continue
        curves = read_curves(metrics)
        name = metrics.absolute().parent.name
        write_text(output, training_page(name, curves, every if goes_on else None))
        if not told and not arguments.quiet:
            print(output, flush=True)
            told = True
        if not goes_on:
            return 0
        time.sleep(every)


def _has_ended(metrics: Path) -> bool:
    """Whether the run wrote its last file after its last step."""
    evaluation = metrics.with_name("evaluation.json")
    try:
        return evaluation.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    except OSError:
        return False
