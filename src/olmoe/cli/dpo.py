"""Learn from preferences (DPO, KTO), by a TOML configuration, or continue an interrupted run with --resume."""

from __future__ import annotations

import argparse
import functools

from olmoe.cli.train import configure, follow

__all__ = ["configure", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Learn; Ctrl-C finishes the step, saves, and says how to continue."""
    from olmoe.train.finetune.config import PreferenceConfig, load_config

    config = load_config(arguments.config, PreferenceConfig)  # before torch is imported: mistakes are reported at once
    from olmoe.train.finetune.dpo import dpo

    return follow(arguments, functools.partial(dpo, config), resume=arguments.resume, overwrite=arguments.overwrite)
