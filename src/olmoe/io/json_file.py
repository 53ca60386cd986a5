"""JSON objects from other programs: `config.json`, `generation_config.json`, an index of shards and the like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olmoe.errors import UserError
from olmoe.io.foreign import check_contents
from olmoe.io.text_file import read_text


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises `OSError` if it cannot be read, `ValueError` if it is not JSON, `TypeError` for JSON of another type, each
    with a reason for the caller's sentence; and `CheckpointError` for another known kind of file.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, endless digits or nesting
        check_contents(path, "JSON file")
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise TypeError(type(value).__name__)
    return value


def read_optional_object(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The object in an optional file, empty if there is no file. Raises `error` for a file that holds no object."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except UserError:
        raise
    except ValueError as problem:
        raise error(f"{path} is not a JSON object ({problem}).") from None
    except TypeError as problem:
        raise error(f"{path} is not a JSON object (it is {problem}).") from None
