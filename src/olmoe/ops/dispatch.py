"""The one rule that chooses a backend for an operation.

Every operation of `olmoe.ops` has a `reference` implementation and may have faster ones. A caller
names a backend or says `auto`:

- `auto` takes the fastest registered backend that supports the call's device and dtype, and logs the
  choice once;
- a name is taken at its word: if that backend cannot run the call, `BackendUnavailableError` says why.

Backends register themselves with `register`; nothing is probed at import time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.runtime import log_once

AUTO = "auto"
# Fastest first. "cpu" (C++) and "triton" join in front when they exist.
PRIORITY = ("torch", "reference")


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an operation; `unsupported(x)` gives the reason it cannot take `x`, or None."""

    function: Callable[..., Any]
    unsupported: Callable[[torch.Tensor], str | None]


_REGISTRY: dict[str, dict[str, Implementation]] = {}


def register(
    op: str, backend: str, unsupported: Callable[[torch.Tensor], str | None] = lambda x: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the implementation of `op` in `backend`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY.setdefault(op, {})[backend] = Implementation(function, unsupported)
        return function

    return decorate


def backends(op: str) -> tuple[str, ...]:
    """The backends that implement `op`, fastest first."""
    return tuple(name for name in PRIORITY if name in _REGISTRY[op])


def choose(op: str, x: torch.Tensor, backend: str = AUTO) -> Callable[..., Any]:
    """The function that computes `op` for a call whose leading tensor is `x`.

    Raises `UserError` for a backend name that does not exist and `BackendUnavailableError` for one that
    does not implement `op` or cannot run on `x`'s device and dtype.
    """
    implementations = _REGISTRY[op]
    if backend == AUTO:
        for name in PRIORITY:
            implementation = implementations.get(name)
            if implementation is not None and implementation.unsupported(x) is None:
                if not torch.compiler.is_compiling():  # a compiled graph has no log
                    log_once(f"{op}: backend {name} on {x.device.type} (chosen automatically)")
                return implementation.function
        raise BackendUnavailableError(f"No backend of {op} supports {x.dtype} on {x.device}.")
    if backend not in PRIORITY:
        raise UserError(f"Unknown backend {backend!r}; choose one of auto, {', '.join(PRIORITY)}.")
    if backend not in implementations:
        raise BackendUnavailableError(
            f"Backend {backend!r} does not implement {op}; choose one of {', '.join(backends(op))}."
        )
    reason = implementations[backend].unsupported(x)
    if reason is not None:
        raise BackendUnavailableError(f"Backend {backend!r} cannot run {op} here: {reason}.")
    return implementations[backend].function
