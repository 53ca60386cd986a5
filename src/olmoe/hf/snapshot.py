"""Detects whether anything that a view of some modules depends on has changed.

Modules change without notice: hooks, adapters and settings come and go, and weights are replaced. So they are compared
at every call, and in C++, because a decoding step has evicted all of these objects from the caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from olmoe.ops.cpu import extension
from olmoe.runner.compile import HOOKS


class Snapshot:
    """Remembers modules as they are when it is `complete`; `unchanged` says whether they are still the same.

    Everything is in Python lists, through which the garbage collector finds the modules.
    """

    def __init__(self) -> None:
        self._dicts: list[dict[str, Any]] = []  # where something is, under which name, and what it is
        self._names: list[str] = []
        self._values: list[Any] = []
        self._modules: list[nn.Module] = []
        self._types: list[type] = []
        self._counted: list[dict[Any, Any]] = []  # attributes and hooks, with their number
        self._counts: list[int] = []
        self.parameters: list[Tensor] = []
        self._layout: object = None  # of all parameters

    def child(self, owner: nn.Module, name: str) -> None:
        """Remember which module `owner` has under `name`."""
        self._entry(owner._modules, name)

    def module(self, module: nn.Module, settings: Iterable[str] = ()) -> None:
        """Remember the type of `module`, its hooks, parameters and number of attributes, and what `settings` name."""
        attributes = vars(module)
        self._modules.append(module)
        self._types.append(type(module))
        for counted in (attributes, *(getattr(module, hooks) for hooks in HOOKS)):
            self._counted.append(counted)
            self._counts.append(len(counted))
        for name in (*HOOKS, *settings):
            if name in attributes:
                self._entry(attributes, name)
        for name, parameter in module._parameters.items():
            self._entry(module._parameters, name)
            if parameter is not None:
                self.parameters.append(parameter)

    def complete(self) -> None:
        """Called once everything is recorded: notes where the parameters are in memory."""
        self._layout = _layout(self.parameters)

    def unchanged(self) -> bool:
        """Whether nothing changed since `complete`."""
        same: bool = extension.kernels().unchanged(
            self._dicts, self._names, self._values, self._modules, self._types, self._counted, self._counts
        )
        return same and _layout(self.parameters) == self._layout

    def _entry(self, where: dict[str, Any], name: str) -> None:
        self._dicts.append(where)
        self._names.append(name)
        self._values.append(where[name])


def _layout(parameters: list[Tensor]) -> object:
    """The memory layout of parameters: assigning `data` changes neither the parameter nor its version, and an address
    may be used again, for values of another dtype or for a part of the old ones.
    """  # fmt: skip
    described = extension.kernels().layout(Tensor.__dlpack_c_exchange_api__, parameters)
    # Distributed and fake tensors, and some subclasses, cannot be described.
    return described or [(p.data_ptr(), p.dtype, p.shape, p.is_contiguous()) for p in parameters]
