"""Router policies on the transformers face: change what routers choose, on the kernels and on torch alike.

    model.router_policy = "policy.json"              # until it is None again
    with model.routed_by({"ban": [{"expert": 7}]}):  # inside
        model.generate(...)

A policy is attached to the routers themselves, so it applies to whatever calls them (generation, adapters, gradient
checkpointing, hooks). It belongs to this object in memory and is saved nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from olmoe.errors import UserError, shown
from olmoe.hf.config import OlmoeConfig
from olmoe.model import Router
from olmoe.ops.types import RoutePolicy
from olmoe.runner.kernel_policies import KernelPolicies
from olmoe.runner.policy import ResolvedPolicy
from olmoe.runner.policy_file import AnyPolicy, Policy, as_policy
from olmoe.runner.torch_runner import route_policies
from olmoe.runtime import outside_inference_mode


class ModelPolicy:
    """A policy for all layers of a model, for torch and the kernels; `given` is what it was made from."""

    def __init__(self, given: Policy, resolved: ResolvedPolicy) -> None:
        self.given, self._resolved = given, resolved
        with outside_inference_mode():  # a training step may use them too
            self.routes = route_policies([resolved], torch.device("cpu"))

    @cached_property
    def kernel(self) -> KernelPolicies:
        """For the kernels. Made when they are used: they may not be installed."""
        return KernelPolicies([self._resolved])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own for the kernels."""
        return {name: value for name, value in vars(self).items() if name != "kernel"}


class LayerPolicy(NamedTuple):
    """The part of a policy that concerns one layer's router."""

    whole: ModelPolicy
    layer: int

    @property
    def kernel(self) -> KernelPolicies:
        """The whole policy for the kernels, which also take the number of the layer."""
        return self.whole.kernel

    def on(self, device: torch.device) -> RoutePolicy:
        """What `ops.route` takes."""
        route = self.whole.routes[self.layer]
        if device.type == "cpu":
            return route
        moved: dict[str, Any] = {k: part.to(device) for k, part in route._asdict().items() if isinstance(part, Tensor)}
        return route._replace(**moved)


def router_policy_of(layer: nn.Module) -> LayerPolicy | None:
    """The policy on a decoder layer's router, which must be one of ours."""
    # Through dictionaries: torch's lookup of a module by name is too slow for a decoding step.
    gate = layer._modules["mlp"]._modules["gate"]  # type: ignore[union-attr]
    policy: LayerPolicy | None = vars(gate).get("policy")
    return policy


def alike(policies: Sequence[LayerPolicy | None]) -> bool:
    """Whether these layers have no policy, or one model's policy in the order of its layers."""
    first = policies[0]
    if first is None:
        return all(policy is None for policy in policies)
    return all(p is not None and p.whole is first.whole and p.layer == i for i, p in enumerate(policies))


def with_policy_of_now(layer: nn.Module, block: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`block`, computed with the policy that `layer` has now: a checkpoint calls it again, when it may have changed."""
    if is_compiling():
        return block
    policies = [(router, router.policy) for router in _routers(layer)]

    def computed(x: Tensor) -> Tensor:
        with _as_before(router for router, _ in policies):
            for router, policy in policies:
                router.policy = policy
            return block(x)

    return computed


class RouterPolicies:
    """Mixed into our pre-trained classes: changes to what routers choose."""

    config: Any
    base_model: Any

    @property
    def router_policy(self) -> Policy | None:
        """The policy for the routers' choices; None leaves them unchanged. It can be set to a `RouterPolicy`, the path
        of a JSON file, or a mapping with the keys of one.

        Keys and values in a cache were computed with the policy at that time. Returned router logits, and losses
        computed from them, are the routers' own. Set it on the model itself, not on a wrapper; `routed_by` works on
        wrappers too. Raises `UserError` for a policy that does not fit the model.
        """  # fmt: skip
        found = next((router.policy for layer in self.base_model.layers for router in _routers(layer)), None)
        return None if found is None else found.whole.given

    @router_policy.setter
    def router_policy(self, policy: AnyPolicy | None) -> None:
        whole = None
        if policy is not None:
            try:
                given = as_policy(policy)
            except TypeError:
                raise UserError(
                    f"router_policy must be a RouterPolicy, a file or a mapping, not {shown(policy)}."
                ) from None
            whole = ModelPolicy(given, given.resolve(OlmoeConfig.network(self.config)))
        layers = list(self.base_model.layers)[: self.config.num_hidden_layers]
        found = [(router, number) for number, layer in enumerate(layers) for router in _routers(layer)]
        if not found and whole is not None:
            raise UserError("The model has no router of ours that a policy could change; unwrap or reload it.")
        for router, number in found:
            router.policy = None if whole is None else LayerPolicy(whole, number)

    @contextmanager
    def routed_by(self, policy: AnyPolicy | None) -> Iterator[None]:
        """Set `router_policy` within the block; afterwards the previous one is restored."""
        with _as_before(router for layer in self.base_model.layers for router in _routers(layer)):
            self.router_policy = policy
            yield


def _routers(layer: nn.Module) -> Iterator[Any]:
    """The routers of a layer, inside any adapters or copies around them."""
    return (module for module in layer.modules() if isinstance(module, Router) and "policy" in vars(module))


@contextmanager
def _as_before(routers: Iterable[Any]) -> Iterator[None]:
    """A context after which routers have their previous policies."""
    before = [(router, router.policy) for router in routers]
    try:
        yield
    finally:
        for router, policy in before:
            router.policy = policy
