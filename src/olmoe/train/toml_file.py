"""A TOML file as a dataclass: each unknown key and wrong type is refused by its key."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError, shown
from olmoe.io.text_file import read_text


def resolve_path(path: str, base: Path) -> Path:
    """A path as a shell reads it, `~` and `$NAME` included, from the folder `base`.

    Raises `ConfigError` for an unknown user or variable: no folder is meant to have such a name.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    left = re.match(r"~[^/\\]*", expanded) or re.search(r"\$(\w+|\{[^}]*\})", expanded)
    found = base / expanded
    if left is not None and not found.exists():
        raise ConfigError(
            f"The path {shown(path)} has {left.group()}, which is not defined here; set it, or write the path out."
        )
    return found


def read_toml(path: Path, kind: str = "training configuration") -> dict[str, Any]:
    """The tables of a TOML file, of which `kind` says what it is. Raises `ConfigError` if it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"There is no {kind} {path}.") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a readable text file; give the path of a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def build(cls: Any, table: Any, name: str) -> Any:
    """A dataclass from a TOML table, nested ones included. Raises `ConfigError` for what does not fit it."""
    where = f"[{name}]" if name else "The configuration"
    if not isinstance(table, dict):
        of_list = f", such as {_example(cls)}" if name.endswith("]") else ""
        raise ConfigError(f"{where} must be a table{of_list}, not {shown(table)}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; perhaps {near[0]!r} is meant" if near else ""
        raise ConfigError(
            f"{where} has the unknown key {shown(unknown[0])}; known are {', '.join(sorted(known))}{hint}."
        )
    for key, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in table:
            raise ConfigError(f"{where} lacks {key!r}; add it.")
    values = {key: _convert(hints[key], value, f"{name}.{key}".lstrip(".")) for key, value in table.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type, or `ConfigError`."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, name)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if dataclasses.is_dataclass(option):  # whose own mistakes are told
                return _convert(option, value, name)
            with contextlib.suppress(ConfigError):
                return _convert(option, value, name)
        raise ConfigError(f"{name} has the value {shown(value)} of the wrong type.")
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{name}[{i}]") for i, v in enumerate(value))
        if len(value) == len(arguments):
            return tuple(_convert(h, v, f"{name}[{i}]") for i, (h, v) in enumerate(zip(arguments, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 5e9 tokens
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    if (origin or hint) is tuple:
        raise ConfigError(f"{name} must be a list{_of_what(arguments)}, not {shown(value)}.")
    quoted = "; leave out the quotes" if isinstance(value, str) and hint in (int, float, bool) else ""
    raise ConfigError(f"{name} must be of type {getattr(hint, '__name__', hint)}, not {shown(value)}{quoted}.")


def _of_what(arguments: tuple[Any, ...]) -> str:
    """What a list holds, where that is not obvious from its name."""
    is_table = arguments and dataclasses.is_dataclass(arguments[0])
    return f" of tables, such as [{_example(arguments[0])}]" if is_table else ""


def _example(cls: Any) -> str:
    """A table with the key that comes first."""
    return f"{{ {dataclasses.fields(cls)[0].name} = ... }}"
