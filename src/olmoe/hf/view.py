"""A second object over the state of a first, under another class.

transformers and PEFT make objects of their own classes and hold on to them. Where such an object must behave our way,
a view takes its place: both have the same attributes, whichever of them changes, and no object turns into something
else for those who hold it.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def view_as(kind: type[Kind], original: Any) -> Kind:
    """An instance of `kind` whose attributes are those of `original`, from now on; `kind` is not initialized."""
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", vars(original))
    # torch's hooks of this kind hold their module by a weak reference, which would die with the original.
    for hook in vars(original).get("_load_state_dict_pre_hooks", {}).values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(view)
    return view
