"""The one rule that chooses a backend for an operation.

Every operation of `olmoe.ops` has a `reference` implementation and may have faster ones. A caller
names a backend or says `auto`:

- `auto` takes the fastest registered backend that supports the call's device and dtype, and logs the
  choice once;
- a name is taken literally: if that backend cannot run the call, `BackendUnavailableError` says why.

Under torch's autocast too, one rule applies to all backends: see `call`.

Backends register themselves with `register`; nothing is probed at import time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.ops.autocast import autocast_dtype, without_autocast
from olmoe.runtime import log_once

AUTO = "auto"
# Fastest first; a new backend adds its name here.
PRIORITY = ("cpu", "torch", "reference")
# The operations whose results have autocast's dtype, like those of torch's own.
LOWERED = ("linear", "attention", "isolated_attention")


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an operation.

    `unsupported(*arguments)` gives the reason why it cannot take a call, or None; `prefer(*arguments)` says whether
    an automatic choice should take it when it can. One that `autocasts` handles autocast itself.
    """

    function: Callable[..., Any]
    unsupported: Callable[..., str | None]
    prefer: Callable[..., bool]
    autocasts: bool


_REGISTRY: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    unsupported: Callable[..., str | None] = lambda *arguments: None,
    *,
    prefer: Callable[..., bool] = lambda *arguments: True,
    autocasts: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the implementation of `op` in `backend`.

    Raises `UserError` for a name that is not in `PRIORITY`, because nothing would ever choose it.
    """
    if backend not in PRIORITY:
        raise UserError(
            f"Unknown backend {backend!r} for {op}; use one of {', '.join(PRIORITY)}, or give the new one its place in "
            "PRIORITY (olmoe/ops/dispatch.py)."
        )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY.setdefault(op, {})[backend] = Implementation(function, unsupported, prefer, autocasts)
        return function

    return decorate


def backends(op: str) -> tuple[str, ...]:
    """The backends that implement `op`, fastest first."""
    return tuple(name for name in PRIORITY if name in _REGISTRY[op])


def call(op: str, backend: str, x: torch.Tensor, *rest: Any) -> Any:
    """Compute `op` with the chosen backend; see `choose`.

    Under autocast implementations run as without it, in fp32 where they promise that, and the result of a single
    product or of attention is then rounded to autocast's dtype.
    """
    implementation = _choose(op, backend, x, *rest)
    lower = autocast_dtype(x)
    if lower is None or implementation.autocasts:
        return implementation.function(x, *rest)
    with without_autocast(x):
        result = implementation.function(x, *rest)
        return result.to(lower) if op in LOWERED else result


def choose(op: str, backend: str, x: torch.Tensor, *rest: Any) -> Callable[..., Any]:
    """The function that computes `op` for a call with the arguments `x`, a tensor, and `rest`.

    Raises `UserError` for a backend name that does not exist and `BackendUnavailableError` for one that
    does not implement `op` or cannot run such a call.
    """
    return _choose(op, backend, x, *rest).function


def _choose(op: str, backend: str, x: torch.Tensor, *rest: Any) -> Implementation:
    implementations = _REGISTRY[op]
    if backend == AUTO:
        for name in PRIORITY:
            implementation = implementations.get(name)
            if implementation is None or implementation.unsupported(x, *rest) is not None:
                continue
            if implementation.prefer(x, *rest):
                if not torch.compiler.is_compiling():  # a compiled graph has no log
                    log_once(f"{op}: backend {name} on {x.device.type} (chosen automatically)")
                return implementation
        raise BackendUnavailableError(f"No backend of {op} supports {x.dtype} on {x.device}.")
    if backend not in PRIORITY:
        raise UserError(f"Unknown backend {backend!r}; choose one of auto, {', '.join(PRIORITY)}.")
    if backend not in implementations:
        raise BackendUnavailableError(
            f"Backend {backend!r} does not implement {op}; choose one of {', '.join(backends(op))}."
        )
    reason = implementations[backend].unsupported(x, *rest)
    if reason is not None:
        raise BackendUnavailableError(f"Backend {backend!r} cannot run {op} here: {reason}.")
    return implementations[backend]
