"""The formats that exist, by name: ours, and those that others add with `register_format`.

A new format is a class in one file and one registration. Whatever lists formats (layouts of packed folders, recipes,
the Hugging Face face, GGUF) asks here. Formats unknown to the C++ kernels run on the backends `torch` and `reference`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TypeVar

from olmoe.errors import ConfigError, shown
from olmoe.quant.formats.base import Format

# The name in layouts for a matrix that is not packed.
PLAIN = "bf16"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_RESERVED = (PLAIN, "fp16", "fp32", "float16", "float32", "bfloat16")
_REGISTRY: dict[str, type[Format]] = {}
FORMATS: Collection[str] = _REGISTRY.keys()  # a view, so formats registered later appear in it

Kind = TypeVar("Kind", bound=type[Format])


def register_format(kind: Kind) -> Kind:
    """Add a format, a class that takes no arguments, under its `name`; also a decorator.

    Raises `ConfigError` for a name that is taken, or that cannot be used in a layout.
    """
    name: object = getattr(kind, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise ConfigError(
            f"A weight format cannot be called {shown(name)}; choose a name of lowercase letters, digits and _ that "
            "is no dtype's."
        )
    if _REGISTRY.get(name, kind) is not kind:
        raise ConfigError(f"A weight format called {shown(name)} exists already; choose another name.")
    _REGISTRY[name] = kind
    return kind


def make_format(name: str | None, double_quant: bool = False) -> Format:
    """The format of that name, one of `FORMATS`; `double_quant` also packs the scales of those that can (NF4, FP4)."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ConfigError(f"The weight format {shown(name)} is unknown; choose {' or '.join(FORMATS)}.")
    format = _REGISTRY[name]()
    return format.with_packed_scales() if double_quant else format


def layout_formats() -> tuple[str, ...]:
    """Formats that a `PackedLayout` may name for a matrix."""
    return tuple(name for name, kind in _REGISTRY.items() if not kind.skips_modules)


def saved_formats() -> tuple[str, ...]:
    """Formats that a `SavedLayout` may name for all matrices."""
    return tuple(name for name, kind in _REGISTRY.items() if kind.skips_modules)
