"""Edit a model's weights and save it as an ordinary checkpoint; see what the edit costs, or what a router policy does.

The edits of one call apply in the order listed here: experts are pruned, then merged, then reordered, then layers are
chosen and copied, then the routing is changed. Edits that depend on what experts do measure it on --calibration text;
the report reads other text.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from olmoe.cli.progress import progress_bar

if TYPE_CHECKING:
    from olmoe.analysis.edit_report import EditReport
    from olmoe.analysis.surgery import Edits


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe edit`."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder or hub id, packed or not")
    parser.add_argument(
        "target", nargs="?", metavar="OUT", help="the folder to write; without edits, one written earlier"
    )
    edits = parser.add_argument_group("edits", "applied in this order")
    edits.add_argument(
        "--prune",
        metavar="N|FILE",
        help="remove N experts from each layer, or those listed in a JSON file: [3, 7] for all layers, or "
        '{"0": [3, 7], "1": [1, 2], ...}',
    )
    edits.add_argument(
        "--by",
        choices=("reap", "load", "random"),
        help="which N: those with the least router weight times output norm (reap, the default), the least share of "
        "tokens (load), or random ones (random, a control)",
    )
    edits.add_argument(
        "--merge", type=int, metavar="N", help="average the most similar experts until each layer has N fewer"
    )
    edits.add_argument(
        "--reorder", metavar="load|FILE", help="put the busiest experts first, or take the order from a JSON file"
    )
    edits.add_argument("--layers", metavar="LIST", help="keep these layers in this order, such as 0-3,2,3,4-15")
    edits.add_argument("--duplicate-layers", metavar="LIST", help="put a copy of each of these layers after it")
    edits.add_argument("--top-k", type=int, metavar="K", help="experts per token")
    edits.add_argument(
        "--normalize-top-k",
        action=argparse.BooleanOptionalAction,
        help="whether the probabilities of the chosen experts are divided by their sum (norm_topk_prob)",
    )
    edits.add_argument("--seed", type=int, default=0, help="for --by random (%(default)s)")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE|none",
        help="text like what the model will be used on, UTF-8 or .jsonl with text or messages (default: a short "
        "public-domain sample; none: merge by the similarity of weights)",
    )
    calibration.add_argument(
        "--calibration-tokens", type=int, default=8192, metavar="N", help="at most N tokens of it (%(default)s)"
    )
    report = parser.add_argument_group("report", "OUT against MODEL on held-out text")
    report.add_argument(
        "--report",
        action="store_true",
        help="perplexity, KL, routing, expert load, bytes and speed; without edits, measure an OUT that exists already",
    )
    report.add_argument("--policy", metavar="FILE", help="report on MODEL under a router policy; nothing is written")
    report.add_argument(
        "--text", nargs="+", action="extend", metavar="[NAME=]FILE", help="held-out texts (default: a short sample)"
    )
    report.add_argument(
        "--tokens", type=int, default=16384, metavar="N", help="at most N tokens of each text (%(default)s)"
    )
    report.add_argument("--no-speed", dest="speed", action="store_false", help="no timings")
    report.add_argument("--json", metavar="FILE", help="write the report's numbers to FILE, not to stdout")
    model = parser.add_argument_group("model")
    model.add_argument("--overwrite", action="store_true", help="replace OUT, or the --json FILE, if it exists")
    model.add_argument("--revision", help="branch, tag or commit of a hub model")
    model.add_argument("--offline", action="store_true", help="use only what is on this machine")
    model.add_argument("--dtype", default="auto", help="for the report: auto (as stored), float32, bfloat16 or float16")
    model.add_argument("--backend", default="auto", help="for the report: auto, cpu, torch or reference (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Edit, print what was written, and report."""
    import os
    from pathlib import Path

    from olmoe.analysis.surgery import edit
    from olmoe.io import targets
    from olmoe.runtime import set_threads
    from olmoe.weights import sample_text
    from olmoe.weights.checkpoint import Checkpoint

    edits = _edits(arguments)
    wanted = bool(edits.named())
    _check(arguments, wanted)
    texts = _texts(arguments.text)
    if arguments.json is not None:
        targets.check_file(arguments.json, overwrite=arguments.overwrite, option="--json")
        targets.check_place(Path(os.path.expanduser(arguments.json)))
    set_threads(arguments.threads)
    if wanted:
        calibration = arguments.calibration or [sample_text.CALIBRATION]
        with progress_bar(arguments, "editing", "part") as progress:
            edit(
                arguments.model,
                arguments.target,
                edits,
                calibration=None if calibration == ["none"] else calibration,
                tokens=arguments.calibration_tokens,
                overwrite=arguments.overwrite,
                progress=progress,
                revision=arguments.revision,
                local_files_only=arguments.offline,
            )
        written = Checkpoint.open(arguments.target)
        config = written.config
        experts = f"{config.num_experts} expert{'' if config.num_experts == 1 else 's'}"
        print(
            f"{arguments.target}: {config.num_hidden_layers} layers of {experts}, "
            f"{config.num_experts_per_tok} a token; {written.num_bytes:,} bytes of weights"
        )
    if arguments.report:
        _show(arguments, _report(arguments, texts))
    return 0


def _check(arguments: argparse.Namespace, wanted: bool) -> None:
    """Raise `UserError` for arguments that do not go together."""
    from olmoe.errors import UserError

    if arguments.by is not None and not (arguments.prune or "").isdigit():
        raise UserError(f"--by {arguments.by} chooses the experts that --prune N removes; give a number N.")
    if arguments.policy is not None:
        if wanted or arguments.target is not None:
            raise UserError("--policy is measured on MODEL and nothing is written; leave OUT and the edits out.")
        arguments.report = True
    elif arguments.target is None:
        raise UserError("Give OUT, the folder to write, or --policy FILE to see what a router policy does.")
    elif not wanted and not arguments.report:
        raise UserError("Give an edit, such as --prune 8, or --report to measure an OUT that exists already.")
    if arguments.text and not arguments.report:
        raise UserError("--text is what --report reads; add it, or give text to choose experts by as --calibration.")
    if arguments.json is not None and not arguments.report:
        raise UserError("--json takes the numbers of a report; add --report.")


def _edits(arguments: argparse.Namespace) -> Edits:
    from olmoe.analysis.surgery import Edits, read_lists

    prune, reorder = arguments.prune, arguments.reorder
    if prune is not None:
        prune = int(prune) if prune.lstrip("-").isdigit() else read_lists(prune)
    if reorder is not None and reorder != "load":
        reorder = read_lists(reorder)
    return Edits(
        prune=prune,
        by=arguments.by or "reap",
        merge=arguments.merge,
        reorder=reorder,
        layers=None if arguments.layers is None else _numbers("--layers", arguments.layers),
        duplicate_layers=_numbers("--duplicate-layers", arguments.duplicate_layers or ""),
        top_k=arguments.top_k,
        normalize_top_k=arguments.normalize_top_k,
        seed=arguments.seed,
    )


def _numbers(option: str, text: str) -> list[int]:
    """Comma-separated numbers and ranges of numbers."""
    from olmoe.errors import UserError, shown

    found: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit() and len(first + last) < 12 and int(first) <= int(last)):
            raise UserError(f"{option} takes numbers of layers, such as 0-3,5, not {shown(text)}.")
        found += range(int(first), int(last) + 1)
    return found


def _texts(given: list[str] | None) -> dict[str, str] | None:
    """Files by name; a file given without a name is named after itself, without its suffix."""
    import os
    from pathlib import Path

    from olmoe.errors import UserError

    texts: dict[str, str] = {}
    for text in given or ():
        name, equals, file = text.partition("=")
        if not equals:
            name, file = Path(text).stem, text
        if not (name.strip() and file):
            raise UserError(f"--text takes FILE or NAME=FILE, such as stories=stories.txt, not {text!r}.")
        if name.strip() in texts:
            raise UserError(f"--text names {name.strip()!r} twice; give each text a name of its own, as NAME=FILE.")
        if not os.path.isfile(os.path.expanduser(file)):  # before hours of work
            raise UserError(f"The text {file} cannot be read: it does not exist; check the path.")
        texts[name.strip()] = file
    return texts or None


def _report(arguments: argparse.Namespace, texts: dict[str, str] | None) -> EditReport:
    from olmoe.analysis.edit_report import measure_edit

    with progress_bar(arguments, "measuring", "token") as progress:
        return measure_edit(
            arguments.model,
            arguments.target,
            policy=arguments.policy,
            texts=texts,
            tokens=arguments.tokens,
            speed=arguments.speed,
            backend=arguments.backend,
            dtype=arguments.dtype,
            progress=progress,
            revision=arguments.revision,
            local_files_only=arguments.offline,
        )


def _show(arguments: argparse.Namespace, report: EditReport) -> None:
    """The tables, and the numbers as JSON: in a file, or as the last line."""
    import json
    import os

    from olmoe.io.atomic import write_text

    print(report.table())
    found: dict[str, Any] = report.to_dict()
    if arguments.json is None:
        print(json.dumps(found))
    else:
        write_text(os.path.expanduser(arguments.json), json.dumps(found, indent=1) + "\n")
