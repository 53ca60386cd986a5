"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from olmoe.errors import UserError


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new temporary folder that becomes `target` when the block ends; an old `target` is replaced.

    If the block raises (an interrupt included), the temporary folder is removed and `target` is untouched.
    Raises `UserError` if the disk is full or the place cannot be written.
    """
    target = Path(target)
    with _clear_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield temporary
            # mkdtemp makes folders private to the user; a finished checkpoint follows the umask like any other.
            temporary.chmod(0o777 & ~_umask())
            if target.exists():
                old = temporary.with_suffix(".old")
                target.rename(old)
                temporary.rename(target)
                shutil.rmtree(old)
            else:
                temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that becomes `target` when the block ends; see `atomic_folder`."""
    target = Path(target)
    with _clear_os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            yield temporary
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(target: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _clear_os_errors(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: {target} was not written; free some space and try again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT):
            raise UserError(f"{target} cannot be written ({error.strerror}); choose another place.") from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
