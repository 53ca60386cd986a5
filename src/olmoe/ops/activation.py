"""Activations as modules, as in other libraries, and as the functions that kernels recognise."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

# Modules whose value is `F.silu`; a subclass may compute something else. `olmoe.hf` adds transformers' own.
SILU: set[type[nn.Module]] = {nn.SiLU}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain_activation(activation: Any) -> Any:
    """`F.silu`, which the C++ kernels compute, for a module that is nothing but that; any other activation unchanged.

    Modules with hooks or with a `forward` put into them (transformers' `kernelize`) are called, so that those run.
    """
    if type(activation) not in SILU or "forward" in vars(activation):
        return activation
    return activation if any(getattr(activation, hooks) for hooks in _HOOKS) else F.silu
