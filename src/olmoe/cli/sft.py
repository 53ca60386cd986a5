"""Fine-tune a model on chats, by a TOML configuration, or continue an interrupted run with --resume."""

from __future__ import annotations

import argparse
import functools

from olmoe.cli.train import configure, follow

__all__ = ["configure", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune; Ctrl-C finishes the step, saves, and says how to continue."""
    from olmoe.train.finetune.config import SFTConfig, load_config

    config = load_config(arguments.config, SFTConfig)  # before torch is imported: mistakes are reported at once
    from olmoe.train.finetune.sft import sft

    return follow(arguments, functools.partial(sft, config), resume=arguments.resume, overwrite=arguments.overwrite)
