"""Average checkpoints of one architecture, weight by weight, into a new checkpoint folder."""

from __future__ import annotations

import argparse

TYPES = ("f32", "f16", "bf16")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe average`."""
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="two or more checkpoint folders or hub ids"
    )
    parser.add_argument("target", metavar="OUT", help="a new folder, which transformers and vLLM can read")
    parser.add_argument("--type", choices=TYPES, help="how the means are stored (default: as the checkpoints are)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a folder that holds nothing but a model"
    )
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Average one tensor at a time."""
    import os
    from pathlib import Path

    from tqdm import tqdm

    from olmoe.io import targets
    from olmoe.weights.average import open_average
    from olmoe.weights.to_folder import DTYPES, to_folder

    target = Path(os.path.expanduser(arguments.target))
    if not arguments.overwrite:  # before anything is read
        targets.check_folder(target, (), overwrite=False)
    average, dtype = open_average(arguments.checkpoints, local_files_only=arguments.offline)
    if arguments.type is not None:
        dtype = DTYPES[arguments.type]
    with tqdm(unit="B", unit_scale=True, desc=target.name, disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        to_folder(average, target, dtype, progress, overwrite=arguments.overwrite)
    return 0
