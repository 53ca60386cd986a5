"""Tasks of lm-evaluation-harness by name, pattern or file, and a model's scores on them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

from olmoe.errors import UserError, shown
from olmoe.evaluate.model import OlmoeLM

_log = logging.getLogger("olmoe")


def listing(include_path: Sequence[str] = ()) -> str:
    """All available tasks, as tables."""
    return str(TaskManager(include_path=_folders(include_path)).list_all_tasks()).strip("\n") + "\n"


def find(names: Sequence[str], include_path: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """The harness's task manager, and the tasks that `names` refer to: names, patterns, or YAML files.

    The harness's own thousands of tasks are searched only if the folders in `include_path` do not have them all. Raises
    `UserError` for a name that matches nothing.
    """
    folders = _folders(include_path)
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise UserError("No task is named; give one, or `list`.")
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_meant(name, manager) for name in wanted):
        manager = TaskManager(include_path=folders)
    found: list[str] = []
    for name in wanted:
        meant = _meant(name, manager)
        if not meant:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; --tasks list shows all."
            raise UserError(f"There is no task {shown(name)}{hint}")
        found += meant
    return manager, list(dict.fromkeys(found))


def evaluate(model: OlmoeLM, tasks: Sequence[str], manager: Any, **options: Any) -> dict[str, Any]:
    """The harness's results for a model, with the model's name; `options` are those of its `simple_evaluate`.

    Raises `UserError` if a task's data is not available, or if its definition does not work.
    """
    try:
        with _git_in_silence():
            found: dict[str, Any] = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
    except (ConnectionError, FileNotFoundError) as error:  # what `datasets` raises, even for what is not on the hub
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(
            f"The data of a task is not available ({reason}); make sure that it is on this machine, or that the "
            "network is."
        ) from error
    except (OSError, MemoryError, UserError):
        raise
    except Exception as error:
        if _passed_through_us(error):
            raise
        _log.info("a task failed", exc_info=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(
            f"A task does not work as defined ({reason}); check its YAML file and its data. --verbose shows where."
        ) from error
    found["config"] |= {"model": "olmoe", "model_args": {"pretrained": model.name}, "batch_size": model.batch_size}
    return found


def _passed_through_us(error: Exception) -> bool:
    """Whether the error passed through our own code, called by the harness or a task: then the fault is ours."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("olmoe.") and name != __name__ for name in frames)


@contextlib.contextmanager
def _git_in_silence() -> Iterator[None]:
    """Silence git: the harness records the commit of the current folder, and git complains if there is none."""
    ask = evaluator.get_git_commit_hash

    def commit() -> str | None:
        try:
            done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # git is not installed
            return None
        return done.stdout.strip() or None

    evaluator.get_git_commit_hash = commit
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask


def _folders(given: Sequence[str]) -> list[str]:
    for folder in given:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"There is no folder {folder} with tasks; choose another for --include-path.")
    return [os.path.expanduser(folder) for folder in given]


def _meant(name: str, manager: Any) -> list[str]:
    """The tasks that a name refers to."""
    if name.endswith((".yaml", ".yml")):
        return [name] if Path(name).is_file() else []
    return list(manager.match_tasks([name]))
