"""Trace which experts a model chooses on texts from several domains; write the numbers and a page of figures.

DIR receives trace.safetensors (the experts of every token), metrics.json (the numbers) and report.html. An interrupted
run keeps the domains and revisions it has finished; the same command continues from there.
"""

from __future__ import annotations

import argparse

from olmoe.cli.progress import progress_bar


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe analyze`."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a checkpoint folder or hub id, packed or not (default: olmoe-tiny)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=FILE",
        help="a domain and its text: a UTF-8 file, or .jsonl with text or messages",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a DIR that holds nothing but an analysis")
    parser.add_argument("--against", metavar="MODEL2", help="another model to compare routing with, on the same tokens")
    parser.add_argument(
        "--revisions",
        nargs="+",
        action="extend",
        default=[],
        metavar="R",
        help="earlier checkpoints, compared with MODEL one at a time: branches, tags or commits of its hub repository, "
        "checkpoint folders, or the folder of a training run (without MODEL they are compared with the last of them)",
    )
    parser.add_argument(
        "--tokens", type=int, default=204_800, metavar="N", help="at most N tokens of each domain (%(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=2048, metavar="N", help="tokens the model reads at once (%(default)s)"
    )
    parser.add_argument("--figures", action="store_true", help="write each figure as PNG and SVG as well")
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="write no report.html, which needs matplotlib"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--revision", help="branch, tag or commit of a hub model")
    model.add_argument("--offline", action="store_true", help="use only what is on this machine")
    model.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16 (%(default)s)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    model.add_argument("--backend", default="auto", help="auto, cpu, torch or reference (%(default)s)")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def run(arguments: argparse.Namespace) -> int:
    """Analyse, and print where the results are."""
    from pathlib import Path

    texts = _texts(arguments.text)
    from olmoe.analysis.analyze import analyze
    from olmoe.runtime import set_threads

    set_threads(arguments.threads)
    with progress_bar(arguments, "tracing", "token") as progress:
        found = analyze(
            arguments.model,
            texts,
            arguments.output,
            against=arguments.against,
            revisions=arguments.revisions,
            tokens=arguments.tokens,
            window=arguments.window,
            overwrite=arguments.overwrite,
            report=arguments.report,
            figures=arguments.figures,
            backend=arguments.backend,
            dtype=arguments.dtype,
            device=arguments.device,
            revision=arguments.revision,
            local_files_only=arguments.offline,
            progress=progress,
        )
    if not arguments.quiet:
        domains = ", ".join(f"{name} {numbers['tokens']:,}" for name, numbers in found["domains"].items())
        print(f"{found['tokens']:,} tokens of {found['model']} traced: {domains}")
        if "revisions" in found:
            names = [each["name"] for each in found["revisions"]]
            print(f"{len(names)} revision{'' if len(names) == 1 else 's'}: {', '.join(names)}")
        print(Path(arguments.output).expanduser() / ("report.html" if arguments.report else "metrics.json"))
    return 0


def _texts(given: list[str]) -> dict[str, str]:
    """The file of each domain. Raises `UserError` if one is not NAME=FILE, or a name is given twice."""
    from olmoe.errors import UserError

    texts: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        name = name.strip()
        if not (name and equals and file):
            raise UserError(f"--text takes NAME=FILE, such as stories=stories.txt, not {text!r}.")
        if name in texts:
            raise UserError(f"--text names the domain {name!r} twice; give each text a name of its own.")
        texts[name] = file
    return texts
