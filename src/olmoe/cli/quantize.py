"""Pack a model into 8 or 4 bits a weight, and report what that costs in quality."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from olmoe.weights.recipes import RECIPES

if TYPE_CHECKING:
    from pathlib import Path

    from olmoe.analysis.quality import Report
    from olmoe.model import CausalLM
    from olmoe.tokenizer import Tokenizer
    from olmoe.weights.quantize import Packed
    from olmoe.weights.recipes import Recipe
    from olmoe.weights.source import WeightSource

FORMATS = {name: recipe.summary for name, recipe in RECIPES.items()}
# Tokens that int4 is calibrated on; more cost time, and hardly help.
CALIBRATION_TOKENS = 8192
WINDOW = 512


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe quantize`."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, a hub id, or a .gguf file")
    parser.add_argument("target", metavar="DST", help="the packed folder to write")
    parser.add_argument(
        "--format", choices=FORMATS, help="; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a DST that holds nothing but a model")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument(
        "--calibration",
        metavar="FILE|none",
        help="text like that the model will meet, or .jsonl with text or messages, for int4 (default: a short "
        "public-domain sample; none: do without)",
    )
    report = parser.add_argument_group("quality", "DST beside SRC on held-out text: perplexity, KL, routing agreement")
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
    import os
    from pathlib import Path

    from olmoe.errors import UserError
    from olmoe.io import targets
    from olmoe.runtime import set_threads
    from olmoe.weights import packed

    if arguments.format is None and not arguments.report:
        raise UserError(f"Give --format {'|'.join(FORMATS)} to pack, or --report to measure a DST that exists already.")
    if arguments.tokens < 2:
        raise UserError(f"--tokens must be at least 2, not {arguments.tokens}.")
    set_threads(arguments.threads)
    target = Path(os.path.expanduser(arguments.target))
    if arguments.format is not None and not arguments.overwrite:  # before a source is fetched
        targets.check_folder(target, (), overwrite=False, source=os.path.expanduser(arguments.source))
    source = _open(arguments.source, arguments)
    if arguments.format is not None:
        # Before hours of work, and without the exception that `pack` makes for its own folders.
        names = {packed.FILE_NAME, "config.json", *source.files()}
        targets.check_folder(target, names, overwrite=arguments.overwrite, source=source.path)
        written = _pack(source, target, RECIPES[arguments.format], arguments)
        print(written.table())
    if arguments.report:
        report = _report(source, target, arguments)
        print(report.table())
        print(json.dumps({"source": arguments.source, "target": str(target)} | report.to_dict()))
    return 0


def _open(name: str, arguments: argparse.Namespace) -> WeightSource:
    """The source that a name means."""
    import os

    from olmoe.io import hub
    from olmoe.weights.gguf.source import GGUFSource
    from olmoe.weights.source import FolderSource

    if name.lower().endswith(".gguf"):
        return GGUFSource(os.path.expanduser(name))
    return FolderSource(hub.resolve(name, revision=arguments.revision, local_files_only=arguments.offline))


def _pack(source: WeightSource, target: Path, recipe: Recipe, arguments: argparse.Namespace) -> Packed:
    from tqdm import tqdm

    from olmoe.weights import sample_text
    from olmoe.weights.quantize import pack

    windows = None
    if recipe.searches and arguments.calibration != "none":
        ids = sample_text.read_ids(arguments.calibration or sample_text.CALIBRATION, _tokenizer(source))
        length = min(WINDOW, source.config.max_position_embeddings)
        windows = sample_text.windows(ids, length, CALIBRATION_TOKENS // length)
    with tqdm(unit="weights", unit_scale=True, desc=target.name, disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return pack(source, target, recipe, windows, progress, overwrite=arguments.overwrite)


def _report(source: WeightSource, target: Path, arguments: argparse.Namespace) -> Report:
    from tqdm import tqdm

    from olmoe.analysis import quality
    from olmoe.weights import sample_text

    candidate_source = _open(str(target), arguments)
    ids = sample_text.read_ids(arguments.text or sample_text.HELD_OUT, _tokenizer(source))[: arguments.tokens]
    reference, candidate = _model(source, arguments.source, arguments), _model(candidate_source, str(target), arguments)
    with tqdm(unit="token", unit_scale=True, desc="measuring", disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return quality.compare(reference, candidate, ids, min(WINDOW, source.config.max_position_embeddings), progress)


def _tokenizer(source: WeightSource) -> Tokenizer:
    """The tokenizer that travels with the weights."""
    import tempfile
    from pathlib import Path

    from olmoe.errors import TokenizerError
    from olmoe.tokenizer import Tokenizer

    files = source.files()
    if "tokenizer.json" not in files:
        raise TokenizerError(
            "The model comes without a tokenizer.json, which is needed to read text; put one beside it, or use "
            "--calibration none and no --report."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():  # chat templates included, for calibration on chats
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return Tokenizer.from_folder(folder, eos_ids=source.config.eos_token_ids, pad_id=source.config.pad_token_id)


def _model(source: WeightSource, name: str, arguments: argparse.Namespace) -> CausalLM:
    """The whole model: computing in fp32 if the memory suffices, else in the dtype that it is stored in."""
    import torch

    from olmoe.io import hub
    from olmoe.runtime import available_memory_bytes, log
    from olmoe.weights import checkpoint
    from olmoe.weights.source import load_model

    free = available_memory_bytes()
    fits = free is None or 4 * source.config.num_parameters < 0.8 * free
    if not fits:
        log.warning("%s does not fit the memory in fp32, so it is measured in the dtype that it is stored in", name)
    if name.lower().endswith(".gguf"):
        return load_model(source, torch.float32 if fits else torch.bfloat16)
    folder = hub.resolve(name, revision=arguments.revision, local_files_only=arguments.offline)
    return checkpoint.load(folder, dtype=torch.float32 if fits else None)
