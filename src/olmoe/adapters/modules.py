"""Modules of the network with an adapter beside their weights, which are unchanged, plain or packed.

Products with the low-rank factors are added to those with the weights, and for experts only where tokens chose them;
neither the sum of the matrices nor its gradient is ever formed.

Shapes legend: N tokens, D hidden, E experts, K experts per token, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from olmoe import ops
from olmoe.adapters.adapter import Adapter, Factors
from olmoe.adapters.experts import FrozenExperts, Low, adapted_experts
from olmoe.errors import UserError
from olmoe.model import CausalLM, Experts, Linear, Router
from olmoe.model.network import RouterOutput
from olmoe.ops.transforms import transformed
from olmoe.ops.types import RoutePolicy
from olmoe.quant import PackedExperts, PackedLinear
from olmoe.quant.modules import routed
from olmoe.runtime import no_grad


class LoraLinear(nn.Module):
    """A linear layer with an adapter. `precision` is the dtype of products with its weights, by default the input's."""

    def __init__(
        self, base: Linear | PackedLinear, factors: Factors, scale: float, precision: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.base, self.scale, self.precision = base, scale, precision
        self.weight_a, self.weight_b = map(nn.Parameter, factors)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        low = F.linear(F.linear(x.to(self.weight_a.dtype), self.weight_a), self.weight_b)
        y = self._base(x)
        return y + (low * self.scale).to(y.dtype)

    def _base(self, x: Tensor) -> Tensor:
        base, dtype = self.base, self.precision or x.dtype
        if isinstance(base, PackedLinear) or dtype == x.dtype:
            y: Tensor = base(x.to(dtype))
            return y.to(x.dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        return ops.linear(x.to(dtype), base.weight.to(dtype), bias, backend=base.backend).to(x.dtype)


class LoraRouter(nn.Module):
    """A router with an adapter. Its matrix is small, so here the sum is formed."""

    def __init__(self, base: Router, factors: Factors, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.weight_a, self.weight_b = map(nn.Parameter, factors)

    def forward(self, x_ND: Tensor, policy: RoutePolicy | None = None) -> RouterOutput:
        """See `Router.forward`."""
        weight = self.base.weight.float() + (self.weight_b @ self.weight_a) * self.scale
        found: RouterOutput = functional_call(self.base, {"weight": weight}, (x_ND, policy))
        return found


class LoraExperts(nn.Module):
    """The experts of a layer with adapters for one or both of their stacks; `precision` as in `LoraLinear`.

    Packed ones, and those with a `precision`, are here without any too: a training pass decodes them less often.
    """

    def __init__(
        self,
        base: Experts | PackedExperts,
        factors: dict[str, Factors],
        scale: float,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base, self.scale, self.names, self.precision = base, scale, tuple(factors), precision
        for name, (a, b) in factors.items():
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(b))

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See `Experts.forward`."""
        base = self.base
        if not (self.names or torch.is_grad_enabled()):
            return base(x_ND, expert_ids_NK, weights_NK)
        dtype = self.precision or (base.compute_dtype if isinstance(base, PackedExperts) else None) or x_ND.dtype
        low = {n: Low(self.get_parameter(f"{n}_a"), self.get_parameter(f"{n}_b"), self.scale) for n in self.names}
        if (torch.is_grad_enabled() or self.precision is not None) and not transformed(x_ND):
            return adapted_experts(x_ND, expert_ids_NK, weights_NK, FrozenExperts(base, dtype), low)

        def product(x: Tensor, name: str, e: int) -> Tensor:
            if isinstance(base, PackedExperts):
                y = base.product(x, name, e) if x.requires_grad else base.fastest_product(x, name, e)
            else:
                y = ops.linear(x, base.get_parameter(name)[e], backend=base.backend)
            return y + low[name].product(x.to(low[name].a.dtype), e).to(y.dtype) if name in low else y

        return routed(base, x_ND, expert_ids_NK, weights_NK, product, dtype)


def adapt(model: CausalLM, adapter: Adapter, precision: torch.dtype | None = None) -> None:
    """Put `adapter` beside the weights of `model`; from then on its factors are the only parameters with gradients.

    `precision` is the dtype of products with the weights that are adapted, by default that of hidden states. Products
    with the factors are computed in the factors' own. Raises `UserError`, before anything is changed, for an adapter of
    something else than the layers.
    """
    if other := next((name for name in adapter.factors if not name.startswith("model.layers.")), None):
        raise UserError(
            f"The adapter changes {other}, which cannot be adapted beside packed weights; merge it into the checkpoint "
            "that they were packed from."
        )
    model.requires_grad_(False)
    for number in range(model.config.num_hidden_layers):
        layer: Any = model.model.layers[number]
        stacks: dict[str, Factors] = {}
        for name, factors in adapter.factors.items():
            start, _, rest = name.partition(f"model.layers.{number}.")
            if start or not rest:
                continue
            owner, _, leaf = rest.rpartition(".")
            if owner == "mlp.experts":
                stacks[leaf] = factors
            elif owner == "mlp.gate":
                layer.mlp.gate = LoraRouter(layer.mlp.gate, factors, adapter.scale)
            else:
                layer.set_submodule(owner, LoraLinear(layer.get_submodule(owner), factors, adapter.scale, precision))
        if stacks or precision is not None or isinstance(layer.mlp.experts, PackedExperts):
            layer.mlp.experts = LoraExperts(layer.mlp.experts, stacks, adapter.scale, precision)


def factors_of(model: CausalLM) -> dict[str, Factors]:
    """The factors that `adapt` put into a model, as parameters, under an adapter's names for them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | LoraRouter):
            found[f"{name}.weight"] = Factors(module.weight_a, module.weight_b)
        elif isinstance(module, LoraExperts):
            for leaf in module.names:
                pair = (module.get_parameter(f"{leaf}_{factor}") for factor in "ab")
                found[f"{name}.{leaf}"] = Factors(*pair)
    return found


@no_grad
def adapter_of(model: CausalLM, rank: int, alpha: float) -> Adapter:
    """The adapter of a model, with its current values."""
    return Adapter(rank, alpha, {n: Factors(a.detach(), b.detach()) for n, (a, b) in factors_of(model).items()})
