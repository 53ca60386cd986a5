"""What may be overwritten: nothing that exists, unless requested, and then only files of the writer's own kind.

Every command that writes a file or a folder checks here before it starts to work, and so do the library functions
behind them. An empty folder counts as nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from olmoe.errors import CheckpointError, UserError, shown
from olmoe.io.atomic import atomic_folder

# Weights in several files, whatever their number was before.
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors\.index\.json")


def is_shard(name: str) -> bool:
    """Whether a file of this name is one of several that hold a model's weights, or their index."""
    return _SHARD.fullmatch(name) is not None


def check_file(
    target: str | Path, *, overwrite: bool, source: str | Path | None = None, option: str | None = None
) -> None:
    """Raise `UserError` if `target` exists; with `overwrite`, only if it is not a file that can be replaced.

    `source` is what will be read: it is never replaced. `option` is the option that names the target; without it the
    caller may be a program, to which `--overwrite` means nothing.
    """
    target = Path(os.path.expanduser(target))
    if not os.path.lexists(target):
        return
    _check_source(target, source)
    if os.path.exists(target) and not os.path.isfile(target):
        what = option or "--overwrite"
        raise UserError(f"{target} is not a regular file, so {what} cannot replace it; choose another name.")
    if not overwrite:
        python = " (in Python, overwrite=True)" if option is None else ""
        raise UserError(f"{target} exists already; choose another name, or replace it with --overwrite{python}.")


def check_place(target: Path) -> None:
    """Raise `UserError` if no file can be written at `target`; missing folders are no obstacle."""
    folder = os.path.dirname(os.path.realpath(target))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{target} cannot be written, because {folder} is not a writable folder; choose another place.")


def check_is_checkpoint(target: Path, doing: str) -> None:
    """Raise `CheckpointError` if `target` is a folder of something else, which `doing` would replace entirely."""
    if target.is_dir() and entries(target) and not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} holds other files and no config.json; {doing} would replace it entirely, so choose a new folder."
        )


def check_folder(
    target: str | Path,
    names: Collection[str],
    *,
    overwrite: bool,
    shards: bool = False,
    source: str | Path | None = None,
) -> None:
    """Raise `UserError` if `target` is not a new or empty folder; with `overwrite`, only if it holds foreign files.

    Files with the `names` that will be written are ours and, with `shards`, weights in several files. `source` is what
    will be read: no folder that contains it is replaced.
    """
    target = Path(os.path.expanduser(target))
    if os.path.lexists(target) and not os.path.isdir(target):
        if os.path.exists(target):
            raise UserError(f"{target} is a file, but a folder is to be written there; choose another place.")
        raise UserError(f"{target} is a link to nothing; remove it or choose another place.")
    _check_source(target, source)
    found = entries(target)
    if not found:
        return
    if not overwrite:
        raise UserError(
            f"{target} exists already and holds {some(found)}; choose a new folder, or replace it with --overwrite (in "
            "Python, overwrite=True)."
        )
    if foreign := foreign_entries(target, names, shards=shards):
        raise UserError(
            f"{target} holds {some(foreign)}, which would be lost, so it is not replaced even with --overwrite; "
            "move what is to be kept, or choose a new folder."
        )


def foreign_entries(
    target: Path, names: Collection[str], *, shards: bool = False, also: Callable[[str], bool] | None = None
) -> list[str]:
    """What a folder holds besides files with these `names`; see `check_folder`. `also` says what else is ours."""
    return [
        name
        for name in entries(target)
        if not os.path.isfile(target / name)
        or not (name in names or (shards and is_shard(name)) or (also is not None and also(name)))
    ]


@contextlib.contextmanager
def folder_that_keeps(target: str | Path, foreign: Collection[str]) -> Iterator[Path]:
    """`atomic_folder`, with the `foreign` entries of an old `target` kept in the new one."""
    target = Path(os.path.expanduser(target))
    with atomic_folder(target) as temporary:
        yield temporary
        for name in foreign:
            if not os.path.lexists(temporary / name):
                _link(target / name, temporary / name)


def entries(target: Path) -> list[str]:
    """The names in a folder, sorted; none if it does not exist. Raises `UserError` if it cannot be read."""
    try:
        return sorted(os.listdir(target))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another place.") from None


def some(names: list[str]) -> str:
    """A few names, for a sentence."""
    first = ", ".join(map(shown, names[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _check_source(target: Path, source: str | Path | None) -> None:
    """What is read must be neither the target nor inside it."""
    if source is None or not os.path.exists(source):
        return
    wanted, given = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if wanted == given or (wanted.exists() and os.path.samefile(wanted, given)):
        raise UserError(f"SRC and DST are both {target}, which would be replaced; choose another DST.")
    if wanted in given.parents and entries(wanted):
        raise UserError(f"{target} holds the source {given.name}, which would be replaced with it; choose another DST.")


def _link(old: Path, new: Path) -> None:
    """The same file or folder in a second place: by hard links if the file system has them, else copies."""
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_link_file)
    else:
        _link_file(str(old), str(new))


def _link_file(old: str, new: str) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, new, follow_symlinks=False)
