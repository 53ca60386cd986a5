"""Adding an adapter to the weights that it belongs to, which then need it no more."""

from __future__ import annotations

import torch

from olmoe.adapters.adapter import Adapter
from olmoe.errors import UserError
from olmoe.model import CausalLM
from olmoe.quant import PackedModule


@torch.no_grad()
def merge(model: CausalLM, adapter: Adapter) -> None:
    """Add `adapter` to the weights of `model` in place, in fp32, rounded once to their dtype.

    Raises `UserError`, before anything is changed, if one of them is packed.
    """
    for name in adapter.factors:
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, PackedModule):
            raise UserError(
                f"{name} is packed, so an adapter cannot be added to it; merge with the checkpoint that it was packed "
                "from, and pack the result."
            )
    for name in adapter.factors:
        parameter = model.get_parameter(name)
        if parameter.dim() == 2:
            parameter.copy_(parameter.float() + adapter.delta(name).to(parameter.device))
            continue
        for e, matrix in enumerate(parameter):
            matrix.copy_(matrix.float() + adapter.delta(name, e).to(parameter.device))
