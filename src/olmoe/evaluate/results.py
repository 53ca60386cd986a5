"""Results of an evaluation as files and as a table, in lm-evaluation-harness's own formats."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval.utils import handle_non_serializable, make_table  # type: ignore[import-untyped]

from olmoe.io.atomic import atomic_file, write_text
from olmoe.io.targets import check_file, check_place


def check(target: str | Path, *, overwrite: bool) -> None:
    """Raise `UserError` if results cannot be written to `target`."""
    path = Path(os.path.expanduser(target))
    check_file(path, overwrite=overwrite, option="--output")
    check_place(path)


def write(found: Mapping[str, Any], target: str | Path, *, overwrite: bool) -> list[Path]:
    """Write results to a JSON file, and samples of each task to a .jsonl file beside it -> all files, results last."""
    path = Path(os.path.expanduser(target))
    files = []
    for task, samples in found.get("samples", {}).items():
        file = path.with_name(f"{path.stem}.samples.{re.sub(r'[^0-9A-Za-z_.-]', '_', task)}.jsonl")
        check_file(file, overwrite=overwrite, option="--log-samples")
        with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
            for sample in samples:
                lines.write(json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n")
        files.append(file)
    others = {name: value for name, value in found.items() if name != "samples"}
    write_text(path, json.dumps(others, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    return [*files, path]


def table(found: Mapping[str, Any]) -> str:
    """The scores, and those of groups of tasks, as tables in Markdown."""
    tables = [make_table(found)]
    if found.get("groups"):
        tables.append(make_table(found, "groups"))
    return "\n".join(str(each).rstrip("\n") + "\n" for each in tables)
