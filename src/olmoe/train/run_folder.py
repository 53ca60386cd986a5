"""The folder of a training run: who writes into it, and which of its checkpoints are complete. No torch."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from olmoe.errors import ConfigError

# The system's way to lock a file: fcntl where there is one, else msvcrt.
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None

LOCK_NAME = "lock"
# What programs write that show the metrics; see `trackers`.
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id"
_log = logging.getLogger("olmoe")


def checkpoints(folder: Path) -> list[Path]:
    """The resumable checkpoints of a run by their steps. What is unfinished has another name."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def tracked(folder: Path) -> list[Path]:
    """The files of a run that `trackers` wrote."""
    return [*sorted((folder / TENSORBOARD).glob("events.out.tfevents.*")), folder / WANDB_ID]


def latest(folder: Path) -> Path | None:
    """The newest resumable checkpoint under `folder`, if any."""
    found = checkpoints(folder)
    return found[-1] if found else None


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep every other process from training into `folder` until the block is left.

    The operating system holds the lock for this process and lets go of it however the process ends, so that a killed
    run leaves nothing behind that a new one must wait for. Raises `ConfigError` if another process holds it.
    """
    path = folder / LOCK_NAME
    handle = _take(path)
    try:
        yield
    finally:
        if handle is not None:
            # Removed while it is held: whoever opens it later makes a new one, and whoever waits for it notices.
            if fcntl is not None:
                path.unlink(missing_ok=True)
            handle.close()
            if fcntl is None:
                with contextlib.suppress(OSError):  # another process has it open by now
                    path.unlink(missing_ok=True)


def _take(path: Path) -> IO[str] | None:
    """The locked file; None where the file system has no locks, and the run must do without."""
    while True:
        try:
            handle = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another run.output.") from None
        try:
            _lock(handle)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read(20).strip()
            handle.close()
            who = f" (process {holder})" if holder.isdigit() else ""
            raise ConfigError(
                f"Another olmoe train{who} is writing into {path.parent}; wait until it has ended, or choose another "
                "run.output."
            ) from None
        except OSError as error:
            handle.close()
            _log.warning("%s cannot be locked (%s); see that no other process trains into it", path, error.strerror)
            return None
        if _is_still(handle, path):
            handle.truncate(0)
            handle.write(f"{os.getpid()}\n")
            handle.flush()
            return handle
        handle.close()  # its holder removed it between our opening and our locking


def _is_still(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: IO[str]) -> None:
    """Lock the file for this process. Raises `BlockingIOError` if another one has."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    _lock_on_windows(handle)


def _lock_on_windows(handle: IO[str]) -> None:
    msvcrt = importlib.import_module("msvcrt")
    handle.seek(2**30)  # a byte far beyond the text, which others may still read
    try:
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(*error.args) from None
    finally:
        handle.seek(0)
