"""Turn a dense model into a mixture of experts, from which training can continue."""

from __future__ import annotations

import argparse

FORMS = ("normalized", "scaled", "plain")
DTYPES = ("bf16", "f16", "f32")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe upcycle`."""
    parser.add_argument(
        "dense", metavar="DENSE", help="a folder or hub id: an OLMo (such as OLMo-1B-hf), or an OLMoE with one expert"
    )
    parser.add_argument("target", metavar="OUT", help="a new folder, which `olmoe train` can start from")
    parser.add_argument("--experts", type=int, default=8, metavar="E", help="experts per layer (%(default)s)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (%(default)s)")
    parser.add_argument(
        "--split", type=int, default=1, metavar="N", help="make each expert one of N parts of the MLP (%(default)s)"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="normalized",
        help="how the dense model's outputs are kept: by dividing probabilities by their sum, by scaling the down "
        "matrices, or not at all, as in the paper's script (%(default)s)",
    )
    parser.add_argument("--noise", type=float, default=0.0, metavar="SHARE", help="share of weights that get noise (0)")
    parser.add_argument(
        "--noise-std", type=float, default=0.02, metavar="X", help="its standard deviation (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for routers and noise (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the written weights (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="text to measure the loss on (default: a held-out text)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384,
        metavar="N",
        help="at most N tokens of it; 0 measures no loss (%(default)s)",
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text to measure an OLMo's queries and keys on (default: a shipped text)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds nothing but a model")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument("--json", action="store_true", help="print the losses as a line of JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Write the model, and print how the loss changed."""
    import json
    from pathlib import Path

    from olmoe.cli.progress import progress_bar
    from olmoe.errors import UserError
    from olmoe.io import targets
    from olmoe.train.upcycle import upcycle
    from olmoe.weights import sample_text
    from olmoe.weights.to_folder import DTYPES as TORCH_DTYPES
    from olmoe.weights.upcycle import Upcycling

    target = Path(arguments.target).expanduser()
    if not arguments.overwrite:  # before anything is read
        targets.check_folder(target, (), overwrite=False)
    if arguments.tokens < 0:
        raise UserError(f"--tokens must be 0 or more, not {arguments.tokens}.")
    plan = Upcycling(
        experts=arguments.experts,
        top_k=arguments.top_k,
        split=arguments.split,
        form=arguments.form,
        noise=arguments.noise,
        noise_std=arguments.noise_std,
        seed=arguments.seed,
    )
    with progress_bar(arguments, target.name, "B") as progress:
        losses = upcycle(
            arguments.dense,
            target,
            plan,
            dtype=TORCH_DTYPES[arguments.dtype],
            text=arguments.text or sample_text.HELD_OUT,
            calibration=arguments.calibration or sample_text.CALIBRATION,
            tokens=arguments.tokens,
            overwrite=arguments.overwrite,
            revision=arguments.revision,
            local_files_only=arguments.offline,
            progress=progress,
        )
    if losses is None:
        return 0
    if arguments.json:
        print(json.dumps({"before": losses.before, "after": losses.after, "tokens": losses.tokens}))
    else:
        print(f"held-out loss: {losses.before:.4f} dense, {losses.after:.4f} now ({losses.tokens:,} tokens)")
    return 0
