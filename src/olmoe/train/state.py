"""Resumable checkpoints of a training run: the model in its ordinary format, and all else beside it.

`RUN/checkpoints/step-000500/` is a checkpoint folder that any loader reads, plus `training_state.pt`
with the optimizer and the counters. Folders appear whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olmoe import checkpoint
from olmoe.atomic import atomic_folder, write_text
from olmoe.errors import CheckpointError, ConfigError
from olmoe.model import CausalLM

STATE_NAME = "training_state.pt"


@dataclass
class Progress:
    """Where a run stands. `step` counts finished optimizer steps; `best` is the lowest held-out loss so far."""

    step: int = 0
    tokens: int = 0
    best: float = float("inf")
    best_step: int = 0
    counts_LE: list[list[int]] = field(default_factory=list)


def save_state(
    folder: Path,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprint: dict[str, Any],
    extra_files: dict[str, str],
) -> Path:
    """Write `checkpoints/step-N` under `folder` and return its path."""
    target = folder / "checkpoints" / f"step-{progress.step:07d}"
    with atomic_folder(target) as temporary:
        checkpoint.write_model(model, temporary)
        for name, text in extra_files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        # The fingerprint travels as JSON text, which compares equal after a round trip.
        state = {
            "optimizer": optimizer.state_dict(),
            "progress": vars(progress),
            "fingerprint": json.dumps(fingerprint),
        }
        torch.save(state, temporary / STATE_NAME)
    return target


def latest(folder: Path) -> Path | None:
    """The newest resumable checkpoint under `folder`, if any."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints under `folder`."""
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def restore(path: Path, model: CausalLM, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]) -> Progress:
    """Load a checkpoint of `save_state` into `model` and `optimizer`.

    Raises `ConfigError` if the configuration changed in a way that would not continue the same run, and
    `CheckpointError` if the state is unreadable.
    """
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        progress = Progress(**state["progress"])
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{path / STATE_NAME} cannot be read ({error}); resume from another checkpoint."
        ) from None
    was, now = json.loads(state["fingerprint"]), json.loads(json.dumps(fingerprint))
    for section in now:
        if was.get(section) != now[section]:
            raise ConfigError(
                f"The configuration's [{section}] changed since {path}: it was {was.get(section)}, now {now[section]}. "
                "Restore it, or start a new run in another output folder."
            )
    loaded = checkpoint.load(path, dtype=torch.float32)
    with torch.no_grad():
        for (name, parameter), (_, value) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
            assert parameter.shape == value.shape, name
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return progress


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the records of a metrics file that come after `step`, which the resumed run will write again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line that a crash cut short
    write_text(path, "".join(kept))


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))
