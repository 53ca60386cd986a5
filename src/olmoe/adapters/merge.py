"""Making a model compute with an adapter: added to its weights, or computed beside them."""

from __future__ import annotations

from olmoe.adapters.adapter import Adapter, Factors
from olmoe.adapters.modules import adapt
from olmoe.errors import UserError
from olmoe.model import CausalLM
from olmoe.quant import PackedModule
from olmoe.runtime import no_grad


def apply(model: CausalLM, adapter: Adapter) -> None:
    """Make `model` compute with `adapter`: added to its weights or, if one of them is packed, beside all of them."""
    packed = any(isinstance(model.get_submodule(name.rpartition(".")[0]), PackedModule) for name in adapter.factors)
    if not packed:
        merge(model, adapter)
        return
    device = model.model.norm.weight.device
    moved = {name: Factors(a.float().to(device), b.float().to(device)) for name, (a, b) in adapter.factors.items()}
    adapt(model, Adapter(adapter.rank, adapter.alpha, moved))
    model.requires_grad_(False)


@no_grad
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
