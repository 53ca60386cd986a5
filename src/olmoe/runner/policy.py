"""Changes to what routers choose, as data: no model is touched, and each sequence of a call may have its own. No torch.

With the router logits z of a token, its bias b and the temperature T of a layer:

    chosen  = the pinned experts, then those with the largest softmax(z + b), `top_k` in total
    weights = softmax((z + b) / T) of the chosen, divided by their sum if requested

Shapes legend: P policies, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from olmoe.errors import UserError

if TYPE_CHECKING:
    from olmoe.config import ModelConfig

# The lowest and the highest router temperature: logits divided by less may overflow.
TEMPERATURES = (0.001, 1000.0)


@dataclass(frozen=True, eq=False)
class RouterPolicy:
    """Changes to what routers choose, for all layers; None leaves the model's own setting.

    - `bias` (L, E): added to the router logits before the softmax. Minus infinity keeps an expert from being chosen.
    - `banned` (L, E): True for experts that are never chosen.
    - `top_k`: the number of experts that a token chooses in each layer.
    - `renormalize`: whether the chosen probabilities are divided by their sum.
    - `pinned` (L, E): True for experts that every token chooses. They count among the `top_k`, and the weight of each
      is its own probability.
    - `temperature`, a number or (L,): the logits, bias included, are divided by it before the softmax that gives the
      weights. Which experts are chosen does not depend on it.
    """

    bias: npt.ArrayLike | None = None
    banned: npt.ArrayLike | None = None
    top_k: int | None = None
    renormalize: bool | None = None
    pinned: npt.ArrayLike | None = None
    temperature: npt.ArrayLike | None = None

    def resolve(self, config: ModelConfig) -> ResolvedPolicy:
        """The values for a given model. Raises `UserError` for shapes and numbers that do not fit it."""
        shape = (config.num_hidden_layers, config.num_experts)
        bias = self._biases(shape)
        top_k = config.num_experts_per_tok if self.top_k is None else self.top_k
        if not 1 <= top_k <= config.num_experts:
            raise UserError(
                f"A router policy must choose from 1 to {config.num_experts} experts per token, not {top_k}."
            )
        left = int(np.isfinite(bias).sum(axis=1).min())
        if left < top_k:
            raise UserError(f"A router policy leaves {left} experts in a layer, but each token chooses {top_k}.")
        pinned = _mask("pinned", self.pinned, shape)
        if pinned is not None:
            most = int(pinned.sum(axis=1).max())
            if most > top_k:
                raise UserError(f"A router policy pins {most} experts in a layer, but each token chooses {top_k}.")
            for layer, expert in np.argwhere(pinned & np.isneginf(bias)).tolist():
                raise UserError(f"A router policy both pins and bans the expert {expert} of layer {layer}.")
        norm = config.norm_topk_prob if self.renormalize is None else self.renormalize
        return ResolvedPolicy(bias, top_k, norm, pinned, self._temperatures(config.num_hidden_layers))

    def _biases(self, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """What is added to logits, minus infinity for banned experts included."""
        bias = np.zeros(shape, dtype=np.float32)
        if self.bias is not None:
            given = np.asarray(self.bias, dtype=np.float32)
            if given.shape != shape:
                raise UserError(f"A router bias must have the shape {shape} (layers, experts), not {given.shape}.")
            if np.isnan(given).any() or np.isposinf(given).any():
                raise UserError("A router bias must consist of numbers, or minus infinity for experts to leave out.")
            bias = given.copy()
        banned = _mask("banned", self.banned, shape)
        if banned is not None:
            bias[banned] = -np.inf
        return bias

    def _temperatures(self, layers: int) -> npt.NDArray[np.float32] | None:
        """The temperature of each layer; None if all are 1."""
        if self.temperature is None:
            return None
        given = np.asarray(self.temperature, dtype=np.float32)
        if given.shape not in ((), (layers,)):
            raise UserError(
                f"A router temperature must be one number or {layers}, one per layer, not of shape {given.shape}."
            )
        least, most = TEMPERATURES
        for wrong in given[~((given >= least) & (given <= most))].tolist():
            raise UserError(f"A router temperature must be from {least} to {most}, not {wrong:g}.")
        return None if (given == 1).all() else np.broadcast_to(given, (layers,)).copy()


class ResolvedPolicy(NamedTuple):
    """A `RouterPolicy` resolved for a model: bias (L, E) fp32, experts per token, whether to renormalise.

    Also `pinned` (L, E) and the `temperature` of each layer (L,) fp32, each None if the policy does without.
    """

    bias: npt.NDArray[np.float32]
    top_k: int
    renormalize: bool
    pinned: npt.NDArray[np.bool_] | None = None
    temperature: npt.NDArray[np.float32] | None = None

    def identity(self) -> list[bytes]:
        """Bytes that differ for policies that choose or weigh differently, since keys and values depend on them."""
        arrays = (self.bias, self.pinned, self.temperature)
        return [
            f"{self.top_k} {self.renormalize}".encode(),
            *(b"" if array is None else array.tobytes() for array in arrays),
        ]

    def changes(self, config: ModelConfig) -> bool:
        """Whether anything differs from the model's own settings."""
        own = (config.num_experts_per_tok, config.norm_topk_prob)
        changed = self.pinned is not None or self.temperature is not None or bool(self.bias.any())
        return changed or (self.top_k, self.renormalize) != own


def own_policy(config: ModelConfig) -> ResolvedPolicy:
    """The policy that is equivalent to a model's own settings."""
    return RouterPolicy().resolve(config)


class StackedPolicies(NamedTuple):
    """Several `ResolvedPolicy`s as arrays (P, ...), the last two of which are None if no policy needs them."""

    bias: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    renormalize: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_] | None
    temperature: npt.NDArray[np.float32] | None


def stack_policies(policies: Sequence[ResolvedPolicy]) -> StackedPolicies:
    """Policies for one model, stacked for kernels and tensors."""
    first = policies[0].bias
    assert all(policy.bias.shape == first.shape for policy in policies)
    pinned, temperature = None, None
    if any(policy.pinned is not None for policy in policies):
        none = np.zeros(first.shape, dtype=bool)
        pinned = np.stack([none if policy.pinned is None else policy.pinned for policy in policies])
    if any(policy.temperature is not None for policy in policies):
        one = np.ones(len(first), dtype=np.float32)
        temperature = np.stack([one if policy.temperature is None else policy.temperature for policy in policies])
    return StackedPolicies(
        np.stack([policy.bias for policy in policies]),
        np.array([policy.top_k for policy in policies], dtype=np.int32),
        np.array([policy.renormalize for policy in policies], dtype=bool),
        pinned,
        temperature,
    )


def _mask(what: str, given: npt.ArrayLike | None, shape: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """A mask as an array; None if it has no True."""
    mask = np.zeros(shape, dtype=bool) if given is None else np.asarray(given, dtype=bool)
    if mask.shape != shape:
        raise UserError(f"A mask of {what} experts must have the shape {shape}, not {mask.shape}.")
    return mask if mask.any() else None
