"""Learn from preferences (DPO, KTO), by a TOML configuration, or continue an interrupted run with --resume.

Several processes share a run that torchrun starts: torchrun --nproc-per-node 8 -m olmoe dpo CONFIG.toml
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from olmoe.cli.train import configure, launch

if TYPE_CHECKING:
    from olmoe.train.finetune.config import PreferenceConfig

__all__ = ["configure", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Learn; Ctrl-C finishes the step, saves, and says how to continue."""

    def load(resume: bool) -> PreferenceConfig:
        from olmoe.train.finetune.config import PreferenceConfig, load_config

        return load_config(arguments.config, PreferenceConfig)

    def loop() -> Callable[..., Path]:
        from olmoe.train.finetune.dpo import dpo

        return dpo

    return launch(arguments, load, loop)
