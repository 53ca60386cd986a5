"""Router policies as JSON: the same object in files, in Python and in the server's field `router_policy`. No torch.

    {"boost": [{"layer": 3, "expert": 12, "bias": 2.0}], "ban": [{"expert": 7}],
     "pin": [{"layer": 0, "experts": [4, 9]}], "allow": [{"layer": 1, "experts": [0, 1, 2, 3, 4]}],
     "k": 4, "renormalize": true, "temperature": 0.5}

An entry without a layer applies to all layers; whatever is left out stays the model's own. Layers and experts are known
only with a model, so a policy that was read is resolved later, just like a `RouterPolicy`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from olmoe.errors import UserError, shown
from olmoe.io.atomic import write_text
from olmoe.io.json_file import read_object
from olmoe.runner.policy import TEMPERATURES, ResolvedPolicy, RouterPolicy

if TYPE_CHECKING:
    from olmoe.config import ModelConfig

_KEYS = ("boost", "ban", "k", "renormalize", "pin", "allow", "temperature")
_PLACE = ("layer", "expert", "experts")


class Policy(Protocol):
    """Anything that changes what routers choose: a `RouterPolicy`, or a `NamedPolicy`."""

    def resolve(self, config: ModelConfig) -> ResolvedPolicy:
        """The values for a given model. Raises `UserError` for anything that does not fit it."""
        ...


# What callers may give as a policy: see `as_policy`.
AnyPolicy: TypeAlias = Policy | Mapping[str, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class NamedPolicy:
    """A policy by layers and experts; a layer of None means all layers.

    - `boost` holds (layer, expert, bias): the bias is added to router logits.
    - `ban` holds (layer, expert): never chosen. `allow`: in the layers it names, only these are chosen.
    - `pin` holds (layer, expert): chosen by every token.
    - `k`, `renormalize`: experts per token, and whether their weights sum to one.
    - `temperature`: the routers' temperature, one number or one per layer.
    """

    boost: tuple[tuple[int | None, int, float], ...] = ()
    ban: tuple[tuple[int | None, int], ...] = ()
    k: int | None = None
    renormalize: bool | None = None
    pin: tuple[tuple[int | None, int], ...] = ()
    allow: tuple[tuple[int | None, int], ...] = ()
    temperature: float | tuple[float, ...] | None = None

    def resolve(self, config: ModelConfig) -> ResolvedPolicy:
        """The values for a given model. Raises `UserError` for layers and experts that it does not have."""
        shape = layers, experts = config.num_hidden_layers, config.num_experts
        bias = np.zeros(shape, dtype=np.float32)
        banned, pinned, allowed = (np.zeros(shape, dtype=bool) for _ in range(3))
        for layer, expert, value in self.boost:
            bias[_place(layer, expert, layers, experts)] += value
        for places, mask in ((self.ban, banned), (self.pin, pinned), (self.allow, allowed)):
            for layer, expert in places:
                mask[_place(layer, expert, layers, experts)] = True
        banned |= allowed.any(axis=1, keepdims=True) & ~allowed
        return RouterPolicy(bias, banned, self.k, self.renormalize, pinned, self.temperature).resolve(config)


def named(policy: ResolvedPolicy) -> NamedPolicy:
    """The same policy by layers and experts, for a file."""
    pinned = () if policy.pinned is None else _places(policy.pinned)
    temperature = None if policy.temperature is None else tuple(policy.temperature.tolist())
    boosted = _places((policy.bias != 0) & np.isfinite(policy.bias))
    return NamedPolicy(
        boost=tuple((layer, expert, float(policy.bias[layer, expert])) for layer, expert in boosted),
        ban=_places(np.isneginf(policy.bias)),
        k=policy.top_k,
        renormalize=policy.renormalize,
        pin=pinned,
        temperature=temperature,
    )


def as_policy(value: object) -> Policy:
    """The policy that a caller gives as a policy, the path of a file, or a mapping with the keys of a file.

    Raises `UserError` for a file or a mapping that is not a valid policy, and `TypeError` for anything else.
    """
    if isinstance(value, str | os.PathLike):
        return read_policy(os.fspath(value))
    if isinstance(value, Mapping):
        try:
            return to_policy(value)
        except UserError as error:
            raise UserError(f"The router policy is wrong: {error}") from None
    if not callable(getattr(value, "resolve", None)):
        raise TypeError(f"a router policy cannot be a {type(value).__name__}")
    policy: Policy = value  # type: ignore[assignment]  # what matters is that it resolves
    return policy


def read_policy(path: str | Path) -> NamedPolicy:
    """The policy in a file. Raises `UserError` if it is not one."""
    path = Path(os.path.expanduser(path))
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


def write_policy(path: str | Path, policy: NamedPolicy) -> None:
    """Write a file that `read_policy` reads as an equal policy. An existing file is replaced."""
    write_text(os.path.expanduser(path), to_text(policy))


def to_text(policy: NamedPolicy) -> str:
    """The text of a policy's file, one entry per line."""
    fields = []
    for key, value in to_json(policy).items():
        if isinstance(value, list) and isinstance(value[0], dict):
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            fields.append(f'  "{key}": [\n{entries}\n  ]')
        else:
            fields.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(fields) + "\n}\n" if fields else "{}\n"


def to_json(policy: NamedPolicy) -> dict[str, Any]:
    """The JSON object of a policy, without the settings that it leaves alone."""
    temperature = policy.temperature
    values = {
        "boost": _grouped((layer, expert, {"bias": bias}) for layer, expert, bias in policy.boost),
        "ban": _grouped((layer, expert, {}) for layer, expert in policy.ban),
        "k": policy.k,
        "renormalize": policy.renormalize,
        "pin": _grouped((layer, expert, {}) for layer, expert in policy.pin),
        "allow": _grouped((layer, expert, {}) for layer, expert in policy.allow),
        "temperature": list(temperature) if isinstance(temperature, tuple) else temperature,
    }
    return {key: value for key, value in values.items() if value is not None and value != []}


def to_policy(value: Mapping[str, Any]) -> NamedPolicy:
    """The policy of a JSON object. Raises `UserError` for unknown keys, and for values of other types."""
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise UserError(f"it has the key {shown(unknown[0])}; the keys are {', '.join(_KEYS)}.")
    boost = [
        (layer, expert, _number(entry.get("bias"), f"{where}.bias", -1e4, 1e4))
        for where, entry in _entries(value, "boost")
        for layer, expert in _experts(entry, where, (*_PLACE, "bias"))
    ]
    ban, pin, allow = (
        tuple(place for where, entry in _entries(value, key) for place in _experts(entry, where, _PLACE))
        for key in ("ban", "pin", "allow")
    )
    for where, entry in _entries(value, "allow"):
        if not _experts(entry, where, _PLACE):
            raise UserError(f"{where} allows no experts at all ({shown(entry)}); leave it out, or name some.")
    k, renormalize, temperature = value.get("k"), value.get("renormalize"), value.get("temperature")
    if k is not None and type(k) is not int:
        raise UserError(f"k must be a whole number, not {shown(k)}.")
    if renormalize is not None and type(renormalize) is not bool:
        raise UserError(f"renormalize must be true or false, not {shown(renormalize)}.")
    if isinstance(temperature, list | tuple):
        temperature = tuple(_number(each, f"temperature[{i}]", *TEMPERATURES) for i, each in enumerate(temperature))
    elif temperature is not None:
        temperature = _number(temperature, "temperature", *TEMPERATURES)
    return NamedPolicy(tuple(boost), ban, k, renormalize, pin, allow, temperature)


def _entries(value: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    """The entries under a key, each with its name for messages."""
    entries = value.get(key)
    if entries is None:
        return []
    if not isinstance(entries, list | tuple):
        raise UserError(f"{key} must be a list, not {shown(entries)}.")
    return [(f"{key}[{index}]", entry) for index, entry in enumerate(entries)]


def _experts(entry: Any, where: str, keys: tuple[str, ...]) -> list[tuple[int | None, int]]:
    """The experts that an entry names: (layer, expert) for its `expert` or for each of its `experts`."""
    if not isinstance(entry, Mapping) or not set(entry) <= set(keys) or ("expert" in entry) == ("experts" in entry):
        named = ", ".join(key for key in keys if key != "experts")
        raise UserError(
            f"{where} must be an object with {named}, not {shown(entry)}; several experts are a list, experts."
        )
    layer, experts = entry.get("layer"), entry.get("experts", [entry.get("expert")])
    whole = isinstance(experts, list | tuple) and all(type(expert) is int for expert in experts)
    if not whole or not (layer is None or type(layer) is int):
        raise UserError(f"{where} must have whole numbers for layer and expert, not {shown(entry)}.")
    return [(layer, expert) for expert in experts]


def _number(value: Any, where: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{where} must be a number between {least:g} and {most:g}, not {shown(value)}.")
    return float(value)


def _place(layer: int | None, expert: int, layers: int, experts: int) -> tuple[Any, int]:
    if not 0 <= expert < experts:
        raise UserError(f"A router policy names the expert {expert}, but the model's are 0 to {experts - 1}.")
    if layer is not None and not 0 <= layer < layers:
        raise UserError(f"A router policy names the layer {layer}, but the model's are 0 to {layers - 1}.")
    return (slice(None) if layer is None else layer), expert


def _places(mask: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """The (layer, expert) pairs that are True."""
    return tuple((layer, expert) for layer, expert in np.argwhere(mask).tolist())


def _grouped(places: Iterable[tuple[int | None, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Entries of a file: adjacent experts with the same layer and bias become one entry."""
    entries = []
    for (layer, rest), group in itertools.groupby(places, key=lambda place: (place[0], place[2])):
        experts = [expert for _, expert, _ in group]
        entry: dict[str, Any] = {} if layer is None else {"layer": layer}
        entry |= {"expert": experts[0]} if len(experts) == 1 else {"experts": experts}
        entries.append(entry | rest)
    return entries
