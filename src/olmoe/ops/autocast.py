"""What torch's autocast means for the operations: it lowers single products and attention, and nothing else.

Routers, routed sums and losses stay in fp32, as the numerics policy requires. Products through `Linear` and attention
have autocast's dtype, like torch's own, whatever computes them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives products with `x`; None if it is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products with `x` keep their dtype although autocast is on."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
