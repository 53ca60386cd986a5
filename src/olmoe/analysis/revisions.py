"""Which checkpoints of a training run an analysis compares with the last one (router saturation, Eq. 5, Fig. 20).

They are revisions of the model's repository on the hub ("step5000-tokens20B"), or folders: checkpoints themselves, or
folders that contain some, such as those written by `olmoe train` with `[checkpoint] keep`. Nothing is loaded here.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olmoe.config import ModelConfig, read_object
from olmoe.errors import UserError, shown
from olmoe.io import hub
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.packed_file import CONFIG_KEY

# step5000-tokens20B, step-0000500, global_step500, checkpoint-500, iter_500, 500.
_STEP = re.compile(r"(?<![a-z])(?:step|checkpoint|ckpt|iter)[-_]?(\d{1,18})(?![a-z\d])|^(\d{1,18})$", re.IGNORECASE)


@dataclass(frozen=True)
class Revision:
    """A checkpoint of a run: its name in figures, its location, and its number of steps, if its name says so."""

    name: str
    place: str
    revision: str | None = None

    @property
    def step(self) -> int | None:
        """The number of steps in its name."""
        found = _STEP.search(self.name)
        return None if found is None else int(found[1] or found[2])

    def is_model(self, model: str | None, revision: str | None) -> bool:
        """Whether it is the model itself."""
        if model is None:
            return False
        if self.revision is None:
            folder = os.path.expanduser(hub.folder_or_id(model))
            return os.path.isdir(folder) and os.path.samefile(folder, self.place)
        return self.revision == (revision or "main")

    def config(self, **options: Any) -> ModelConfig:
        """Its architecture, for which no weights are downloaded. `options` are those of `hub.resolve_config`."""
        found = hub.resolve_config(self.place, revision=self.revision, **options)
        if found.is_dir():
            return Checkpoint(found).config
        return ModelConfig.from_dict({key: value for key, value in read_object(found).items() if key != CONFIG_KEY})


def find(model: str | None, revision: str | None, given: Iterable[str | os.PathLike[str]]) -> list[Revision]:
    """The checkpoints that were given, sorted by step if all their names have one, else in the given order.

    A folder without a config.json stands for the checkpoints in it (or in its `checkpoints`). The model itself is left
    out. Raises `UserError` for anything but a folder of either kind or a possible revision of the model.
    """
    listed = [found for each in given for found in _of(os.fspath(each), model)]
    listed = [each for each in listed if not each.is_model(model, revision)]
    names = Counter(each.name for each in listed)
    # From several runs: whole paths distinguish checkpoints of the same step.
    listed = [
        replace(each, name=each.place) if names[each.name] > 1 and each.revision is None else each for each in listed
    ]
    for name, number in Counter(each.name for each in listed).items():
        if number > 1:
            raise UserError(f"The revision {name} is given twice; give each one once.")
    steps = [each.step for each in listed]
    if None not in steps:
        listed.sort(key=lambda each: each.step or 0)
    return listed


def require_alike(model: ModelConfig, listed: Sequence[Revision], **options: Any) -> None:
    """Raise `UserError` unless model and revisions have routers of one shape; `options` as for `Revision.config`."""
    for each in listed:
        config = each.config(**options)
        for name in ("num_hidden_layers", "num_experts"):
            ours, theirs = getattr(model, name), getattr(config, name)
            if ours != theirs:
                raise UserError(
                    f"The revision {each.name} has {name} {theirs}, but the model {ours}; give checkpoints of one run."
                )


def _of(given: str, model: str | None) -> list[Revision]:
    folder = Path(os.path.expanduser(given))
    if given and os.path.isdir(folder):
        if (folder / "config.json").is_file():
            return [Revision(folder.resolve().name, str(folder))]
        return _in_folder(folder)
    if model is None:
        raise UserError(
            f"The revision {shown(given)} is not a folder, and no MODEL is given that could have it; give its hub id."
        )
    if hub.is_shipped(model) or os.path.isdir(os.path.expanduser(model)):
        raise UserError(
            f"The revision {shown(given)} is not a folder, and {model} has no revisions, since it is a folder itself; "
            "give folders of checkpoints, or a hub id as MODEL."
        )
    return [Revision(given, model, given)]


def _in_folder(folder: Path) -> list[Revision]:
    """The checkpoints of a training run, by step; unfinished ones of a killed run have names that start with a dot."""
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    try:
        names = [entry.name for entry in inside.iterdir() if (entry / "config.json").is_file()]
    except OSError as error:
        raise UserError(f"{inside} cannot be read ({error.strerror}); check its permissions.") from None
    found = [Revision(name, str(inside / name)) for name in sorted(names) if not name.startswith(".")]
    if not found:
        raise UserError(f"{inside} holds neither a config.json nor folders with one; give checkpoints of a run.")
    return sorted(found, key=lambda each: math.inf if each.step is None else each.step)
