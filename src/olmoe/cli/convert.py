"""Convert a checkpoint to a GGUF file for llama.cpp, or to an unpacked folder for transformers and vLLM."""

from __future__ import annotations

import argparse

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe convert`."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, a packed one, a hub id, or a .gguf file")
    parser.add_argument(
        "target", metavar="DST", help="a new .gguf file, or a new folder, which transformers and vLLM read"
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        help="how matrices are stored (default: a packed checkpoint's as they are, otherwise bf16)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a DST that is a file, or a folder with nothing but a model"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Convert in the direction that the suffixes say."""
    import os
    from pathlib import Path

    from tqdm import tqdm

    from olmoe.errors import UserError
    from olmoe.io import hub, targets

    source, target = arguments.source, Path(os.path.expanduser(arguments.target))
    to_gguf, from_gguf = _is_gguf(str(target)), _is_gguf(source)
    if to_gguf and from_gguf:
        raise UserError("One of SRC and DST may end in .gguf, but both end so; rename one.")
    overwrite = arguments.overwrite
    if to_gguf:
        targets.check_file(target, overwrite=overwrite)
    elif not overwrite:  # before anything is read
        targets.check_folder(target, (), overwrite=False)
    if not to_gguf and arguments.type in ("q8_0", "q4_0"):
        raise UserError(
            f"A checkpoint folder holds no {arguments.type} from here; leave --type out and use `olmoe quantize`."
        )

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


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")
