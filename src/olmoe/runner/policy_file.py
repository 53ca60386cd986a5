"""Router policies as JSON: the same object in files and in the field `router_policy` of the server.

    {"boost": [{"layer": 3, "expert": 12, "bias": 2.0}], "ban": [{"expert": 7}], "k": 4, "renormalize": true}

An entry without a layer counts in all of them; whatever is left out stays the model's own. Layers and experts are known
only with a model, so a policy that was read is resolved later, as a `RouterPolicy` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from olmoe.errors import UserError, shown
from olmoe.io.json_file import read_object
from olmoe.runner.base import ResolvedPolicy, RouterPolicy

if TYPE_CHECKING:
    from olmoe.config import ModelConfig

_KEYS = ("boost", "ban", "k", "renormalize")


@dataclass(frozen=True)
class NamedPolicy:
    """A policy by layers and experts. `boost` has (layer or None, expert, bias), `ban` (layer or None, expert)."""

    boost: tuple[tuple[int | None, int, float], ...] = ()
    ban: tuple[tuple[int | None, int], ...] = ()
    k: int | None = None
    renormalize: bool | None = None

    def resolve(self, config: ModelConfig) -> ResolvedPolicy:
        """All values, for a model. Raises `UserError` for layers and experts that it does not have."""
        shape = layers, experts = config.num_hidden_layers, config.num_experts
        bias, banned = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        for layer, expert, value in self.boost:
            bias[_place(layer, expert, layers, experts)] += value
        for layer, expert in self.ban:
            banned[_place(layer, expert, layers, experts)] = True
        return RouterPolicy(bias, banned, self.k, self.renormalize).resolve(config)


def read_policy(path: str | Path) -> NamedPolicy:
    """The policy in a file. Raises `UserError` for what is none."""
    path = Path(path)
    try:
        value = read_object(path)
    except OSError as error:
        raise UserError(f"The router policy {path} cannot be read ({error.strerror}).") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"The router policy {path} is not a JSON object ({error}).") from None
    try:
        return to_policy(value)
    except UserError as error:
        raise UserError(f"The router policy {path} is wrong: {error}") from None


def to_policy(value: Mapping[str, Any]) -> NamedPolicy:
    """The policy of a JSON object. Raises `UserError` for unknown keys, and for values of other types."""
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise UserError(f"it has the key {shown(unknown[0])}; the keys are {', '.join(_KEYS)}.")
    boost = [
        (*_expert(entry, f"boost[{index}]", ("layer", "expert", "bias")), _number(entry, f"boost[{index}].bias"))
        for index, entry in enumerate(_entries(value, "boost"))
    ]
    ban = [_expert(entry, f"ban[{index}]", ("layer", "expert")) for index, entry in enumerate(_entries(value, "ban"))]
    k, renormalize = value.get("k"), value.get("renormalize")
    if k is not None and type(k) is not int:
        raise UserError(f"k must be a whole number, not {shown(k)}.")
    if renormalize is not None and type(renormalize) is not bool:
        raise UserError(f"renormalize must be true or false, not {shown(renormalize)}.")
    return NamedPolicy(tuple(boost), tuple(ban), k, renormalize)


def _entries(value: Mapping[str, Any], key: str) -> list[Any]:
    entries = value.get(key)
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise UserError(f"{key} must be a list, not {shown(entries)}.")
    return entries


def _expert(entry: Any, where: str, keys: tuple[str, ...]) -> tuple[int | None, int]:
    if not isinstance(entry, dict) or not set(entry) <= set(keys) or "expert" not in entry:
        raise UserError(f"{where} must be an object with {', '.join(keys)}, not {shown(entry)}.")
    layer, expert = entry.get("layer"), entry["expert"]
    if type(expert) is not int or not (layer is None or type(layer) is int):
        raise UserError(f"{where} must have whole numbers for layer and expert, not {shown(entry)}.")
    return layer, expert


def _number(entry: Mapping[str, Any], where: str) -> float:
    bias = entry.get("bias")
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= 1e4:
        raise UserError(f"{where} must be a number between -10000 and 10000, not {shown(bias)}.")
    return float(bias)


def _place(layer: int | None, expert: int, layers: int, experts: int) -> tuple[Any, int]:
    if not 0 <= expert < experts:
        raise UserError(f"A router policy names the expert {expert}, but the model's are 0 to {experts - 1}.")
    if layer is not None and not 0 <= layer < layers:
        raise UserError(f"A router policy names the layer {layer}, but the model's are 0 to {layers - 1}.")
    return (slice(None) if layer is None else layer), expert
