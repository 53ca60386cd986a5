"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from olmoe.errors import UserError

# Errors of a file system for a path that cannot be written, as opposed to bugs of ours.
_REFUSALS = (
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new temporary folder that becomes `target` when the block ends; an old `target` is replaced.

    If the block raises (an interrupt included), the temporary folder is removed and `target` is untouched.
    Should the process be killed between the two renames of a replacement, the old folder is left beside
    `target` with the suffix `.old`. Raises `UserError` if the disk is full or the path cannot be written.
    """
    target = _through_links(target)
    temporary = _beside(target)
    with clear_os_errors(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file, but a folder is to be written there; choose another place.")
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with clear_os_errors(target):
            temporary.mkdir()
        with clear_os_errors(target, temporary):
            yield temporary
        with clear_os_errors(target):
            _replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that becomes `target` when the block ends; see `atomic_folder`."""
    target = _through_links(target)
    temporary = _beside(target)
    with clear_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with clear_os_errors(target, temporary):
            yield temporary
        with clear_os_errors(target):
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(target: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def clear_os_errors(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn file system errors for `target` into one sentence for the user.

    In the block that writes `temporary`, other files may be read or written as well. Their errors are not about the
    target and pass through; an error that names no file comes from a write to an open one.
    """
    try:
        yield
    except OSError as error:
        if temporary is not None and not _concerns(error, temporary):
            raise
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: {target} was not written; free some space and try again.") from error
        if error.errno in _REFUSALS:
            raise UserError(f"{target} cannot be written ({error.strerror}); choose another place.") from error
        raise


def _concerns(error: OSError, temporary: Path) -> bool:
    """Whether an error names what is being written, or no file at all."""
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes | os.PathLike)]
    return not names or any(Path(os.path.abspath(name)).is_relative_to(temporary) for name in names)


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; whatever fails, `target` is either the old folder or the new one."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_suffix(".old")
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    try:
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:  # an interrupt: gigabytes of weights take a while
        shutil.rmtree(old, ignore_errors=True)
        raise


def _through_links(target: str | Path) -> Path:
    """The path that is really written: a symbolic link is kept, and what it points to is replaced."""
    return Path(os.path.realpath(target))


def _beside(target: Path) -> Path:
    """A name in the same folder that nobody else uses, so that the final rename stays on one file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
