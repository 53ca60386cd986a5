"""Train the arms of an experiment with several seeds, compare them, and draw the result."""

from __future__ import annotations

import argparse
import sys


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe experiment`."""
    parser.add_argument("experiment", metavar="NAME|FILE", help="a TOML file, or the name of one in experiments/")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--output", metavar="DIR", help="where runs and results are kept (default: run.output/NAME)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="train on X times as many tokens (%(default)s)"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing: write the results of what is finished already"
    )
    parser.add_argument("--no-figure", dest="figure", action="store_false", help="no figure, which needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Train what is left, then write results.json, results.md and loss.png, and print the tables."""
    from pathlib import Path

    from olmoe.cli.main import EXIT_INTERRUPTED
    from olmoe.train.experiment.definition import find, load_experiment
    from olmoe.train.experiment.report import write_report
    from olmoe.train.experiment.runs import lay_out

    experiment = load_experiment(find(arguments.experiment))
    output = Path(arguments.output).expanduser() if arguments.output else experiment.output
    runs = lay_out(experiment, output, arguments.seeds, arguments.scale)
    if arguments.figure:
        from olmoe.train.experiment.figure import require_matplotlib

        require_matplotlib()
    if not arguments.report:
        from tqdm import tqdm

        from olmoe.train.experiment.schedule import train_all

        bar = tqdm(
            total=sum(each.tokens for each in runs),
            unit="tok",
            unit_scale=True,
            desc=experiment.name,
            disable=arguments.quiet or None,
        )

        def progress(tokens: int, state: str) -> None:
            bar.set_postfix_str(state, refresh=False)
            bar.update(tokens - bar.n)

        try:
            with bar:
                train_all(runs, arguments.jobs, progress)
        except KeyboardInterrupt:
            finished = sum(each.is_finished for each in runs)
            print(
                f"olmoe: interrupted, saved; {finished} of {len(runs)} runs are finished. The same command continues.",
                file=sys.stderr,
            )
            return EXIT_INTERRUPTED
    print(write_report(experiment, runs, output, figure=arguments.figure), end="")
    return 0
