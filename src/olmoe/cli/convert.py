"""Convert a checkpoint, or a LoRA adapter, to a GGUF file for llama.cpp, or to a folder that other software reads."""

from __future__ import annotations

import argparse
from pathlib import Path

LAYOUTS = ("fused", "per_expert")
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe convert`."""
    parser.add_argument(
        "source", metavar="SRC", help="a checkpoint folder, a packed one, a hub id, a .gguf file, or an adapter"
    )
    parser.add_argument(
        "target", metavar="DST", help="a new .gguf file, or a new folder, which transformers and vLLM can read"
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        help="how matrices are stored (default: a packed checkpoint's as they are, otherwise bf16)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DST if it is a file, or a folder that holds nothing but a model",
    )
    adapter = parser.add_argument_group("adapters")
    adapter.add_argument("--merge", action="store_true", help="write the model with the adapter added to its weights")
    adapter.add_argument(
        "--layout", choices=LAYOUTS, help="how PEFT's file stores experts: fused, or a module for each matrix"
    )
    adapter.add_argument("--base", metavar="DIR|HUB_ID", help="the adapter's model (default: the one it names)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Convert in the direction that the suffixes imply."""
    import os

    from tqdm import tqdm

    from olmoe.errors import UserError
    from olmoe.io import hub, targets

    source, target = arguments.source, Path(os.path.expanduser(arguments.target))
    if (Path(os.path.expanduser(source)) / "adapter_config.json").is_file():
        return _convert_adapter(arguments, Path(os.path.expanduser(source)), target)
    for option in ("merge", "layout", "base"):
        if getattr(arguments, option):
            raise UserError(f"--{option} is for adapters, but {source} holds no adapter_config.json; leave it out.")
    to_gguf, from_gguf = _is_gguf(str(target)), _is_gguf(source)
    if to_gguf and from_gguf:
        raise UserError("Only one of SRC and DST may end in .gguf, but both do; rename one.")
    overwrite = arguments.overwrite
    if to_gguf:
        targets.check_file(target, overwrite=overwrite)
    elif not overwrite:  # before anything is read
        targets.check_folder(target, (), overwrite=False)
    if not to_gguf and arguments.type in ("q8_0", "q4_0"):
        raise UserError(f"A checkpoint folder cannot hold {arguments.type}; leave --type out and use `olmoe quantize`.")

    with tqdm(unit="B", unit_scale=True, desc=target.name, disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if to_gguf:
            from olmoe.weights.gguf.to_gguf import to_gguf as write_gguf

            folder = hub.resolve(source, revision=arguments.revision, local_files_only=arguments.offline)
            write_gguf(folder, target, arguments.type, progress, overwrite=overwrite)
        else:
            from olmoe.weights.checkpoint import open_source
            from olmoe.weights.to_folder import DTYPES, to_folder

            opened = open_source(source, revision=arguments.revision, local_files_only=arguments.offline)
            to_folder(opened, target, DTYPES[arguments.type or "bf16"], progress, overwrite=overwrite)
    return 0


def _convert_adapter(arguments: argparse.Namespace, source: Path, target: Path) -> int:
    """Convert an adapter as the options say: to a merged model, PEFT's files, or a GGUF file."""
    from olmoe.adapters import convert
    from olmoe.errors import UserError
    from olmoe.io import targets
    from olmoe.weights.to_folder import DTYPES

    to_gguf, overwrite = _is_gguf(str(target)), arguments.overwrite
    if arguments.type is not None and (not arguments.merge or arguments.type not in DTYPES):
        raise UserError(f"--type {arguments.type} does not suit an adapter; leave it out, or --merge into f32 to bf16.")
    if arguments.merge and arguments.layout:
        raise UserError(f"--merge leaves no adapter, so --layout {arguments.layout} means nothing; leave one out.")
    if to_gguf and (arguments.merge or arguments.layout):
        raise UserError("A GGUF file holds the adapter by itself; leave --merge and --layout out.")
    if not to_gguf and not arguments.merge and arguments.layout is None:
        raise UserError(
            "An adapter converts to a folder with --merge or --layout, or to a file that ends in .gguf; choose one."
        )
    if not to_gguf and not overwrite:  # before anything is read
        targets.check_folder(target, (), overwrite=False)
    base = convert.open_base(source, arguments.base, revision=arguments.revision, offline=arguments.offline)
    if to_gguf:
        convert.convert_to_gguf(source, base, target, overwrite=overwrite)
    elif arguments.merge:
        convert.merge_to_folder(source, base, target, DTYPES.get(arguments.type), overwrite=overwrite)
    else:
        convert.convert_layout(source, base, target, arguments.layout, overwrite=overwrite)
    return 0


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")
