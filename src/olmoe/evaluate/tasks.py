"""Tasks of lm-evaluation-harness by name, pattern or file, and a model's scores on them."""

from __future__ import annotations

import contextlib
import difflib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

from olmoe.errors import UserError, shown
from olmoe.evaluate.model import OlmoeLM


def listing(include_path: Sequence[str] = ()) -> str:
    """All tasks that there are, as tables."""
    return str(TaskManager(include_path=_folders(include_path)).list_all_tasks()).strip("\n") + "\n"


def find(names: Sequence[str], include_path: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """The harness' manager of tasks, and the tasks that `names` mean: names, patterns, or YAML files.

    The harness' own thousands are looked through only if the folders of `include_path` do not have them all. Raises
    `UserError` for a name that means nothing.
    """
    folders = _folders(include_path)
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise UserError("No task is named; give one, or list.")
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
    """The harness' results of a model, with the model's name; `options` are those of its `simple_evaluate`.

    Raises `UserError` if a task's data cannot be had.
    """
    try:
        with _git_in_silence():
            found: dict[str, Any] = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
    except (ConnectionError, FileNotFoundError) as error:  # what `datasets` raises, also for what is not on the hub
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(
            f"The data of a task cannot be had ({reason}); see that it is on this machine, or that the network is."
        ) from error
    found["config"] |= {"model": "olmoe", "model_args": {"pretrained": model.name}, "batch_size": model.batch_size}
    return found


@contextlib.contextmanager
def _git_in_silence() -> Iterator[None]:
    """The harness notes the commit of the folder that it runs in, and git complains on stderr where there is none."""
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
    """The tasks that a name means."""
    if name.endswith((".yaml", ".yml")):
        return [name] if Path(name).is_file() else []
    return list(manager.match_tasks([name]))
