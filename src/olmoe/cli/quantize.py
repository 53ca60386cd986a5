"""Pack a model into 8 or 4 bits per weight, and report what that costs in quality."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from olmoe.cli.progress import progress_bar
from olmoe.weights.recipes import BASE_RECIPES, RECIPES

if TYPE_CHECKING:
    from olmoe.analysis.quality import Report
    from olmoe.weights.contents import Packed

FORMATS = {name: recipe.summary for name, recipe in (RECIPES | BASE_RECIPES).items()}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe quantize`."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, a hub id, or a .gguf file")
    parser.add_argument("target", metavar="DST", help="the packed folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, help="; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it holds nothing but a model")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument(
        "--calibration",
        metavar="FILE|none",
        help="text like what the model will be used on, or .jsonl with text or messages, for int4 (default: a short "
        "public-domain sample; none: do without)",
    )
    report = parser.add_argument_group("quality", "DST against SRC on held-out text: perplexity, KL, routing agreement")
    report.add_argument(
        "--report", action="store_true", help="measure what was written; without --format, a DST that exists already"
    )
    report.add_argument("--text", metavar="FILE", help="held-out text (default: a short public-domain sample)")
    report.add_argument("--tokens", type=int, default=16384, metavar="N", help="at most N tokens of it (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Pack, print the bytes of each kind of tensor, and report."""
    import json

    from olmoe.errors import UserError
    from olmoe.runtime import set_threads

    if arguments.format is None and not arguments.report:
        raise UserError(f"Give --format {'|'.join(FORMATS)} to pack, or --report to measure a DST that exists already.")
    if arguments.tokens < 2:
        raise UserError(f"--tokens must be at least 2, not {arguments.tokens}.")
    set_threads(arguments.threads)
    if arguments.format is not None:
        print(_pack(arguments).table())
    if arguments.report:
        report = _report(arguments)
        print(report.table())
        names = {"source": arguments.source, "target": str(Path(arguments.target).expanduser())}
        print(json.dumps(names | report.to_dict()))
    return 0


def _pack(arguments: argparse.Namespace) -> Packed:
    from olmoe.weights import sample_text
    from olmoe.weights.quantize import quantize

    with progress_bar(arguments, Path(arguments.target).name, "weights") as progress:
        return quantize(
            arguments.source,
            arguments.target,
            arguments.format,
            calibration=None if arguments.calibration == "none" else arguments.calibration or sample_text.CALIBRATION,
            overwrite=arguments.overwrite,
            progress=progress,
            revision=arguments.revision,
            local_files_only=arguments.offline,
        )


def _report(arguments: argparse.Namespace) -> Report:
    from olmoe.analysis import quality
    from olmoe.weights import sample_text

    with progress_bar(arguments, "measuring", "token") as progress:
        return quality.measure(
            arguments.source,
            arguments.target,
            text=arguments.text or sample_text.HELD_OUT,
            tokens=arguments.tokens,
            progress=progress,
            revision=arguments.revision,
            local_files_only=arguments.offline,
        )
