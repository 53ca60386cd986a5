"""The field `router_policy` of requests: how a client may change the routers' choices, as in policy files.

Errors are reported with the path of the invalid field, before a request reaches the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from olmoe.serve.errors import invalid

if TYPE_CHECKING:
    from olmoe.config import ModelConfig
    from olmoe.runner.policy_file import NamedPolicy, Policy


# Experts named in one policy, repetitions included: several times those in all layers of the released model.
_MOST_EXPERTS = 2**13
_Several = Field(max_length=2 * _MOST_EXPERTS)  # entries of one list; longer ones are not read to their end


class ExpertChoice(BaseModel):
    """One or several experts of a layer, or of every layer if none is named."""

    layer: int | None = None
    expert: int | None = None
    experts: Annotated[list[int], _Several] | None = None


class ExpertBias(ExpertChoice):
    """A number for the router logits of experts."""

    bias: float


class RouterPolicyModel(BaseModel):
    """Changes to what the routers choose: biases; experts chosen never, always, or exclusively; their number and their
    weights.
    """  # fmt: skip

    boost: Annotated[list[ExpertBias], _Several] | None = None
    ban: Annotated[list[ExpertChoice], _Several] | None = None
    k: int | None = None
    renormalize: bool | None = None
    pin: Annotated[list[ExpertChoice], _Several] | None = None
    allow: Annotated[list[ExpertChoice], _Several] | None = None
    temperature: float | Annotated[list[float], _Several] | None = None


def router_policy(given: RouterPolicyModel | None, layers: int, experts: int) -> NamedPolicy | None:
    """The policy of a request. Raises `ApiError` (400) for layers and experts that do not exist."""
    if given is None:
        return None
    from olmoe.runner.policy import TEMPERATURES
    from olmoe.runner.policy_file import NamedPolicy

    named = [entry for entries in (given.boost, given.ban, given.pin, given.allow) for entry in entries or ()]
    count = sum(1 if entry.experts is None else len(entry.experts) for entry in named)
    if count > _MOST_EXPERTS:
        raise invalid(f"router_policy names {count} experts, more than {_MOST_EXPERTS}.", "router_policy")
    boost = []
    for index, each in enumerate(given.boost or ()):
        where = f"router_policy.boost[{index}]"
        if not abs(each.bias) <= 1e4:
            raise invalid(f"{where}.bias must be between -10000 and 10000, not {each.bias}.", f"{where}.bias")
        boost += [(layer, expert, each.bias) for layer, expert in _places(each, where, layers, experts)]
    ban, pin, allow = (
        tuple(
            place
            for index, entry in enumerate(entries or ())
            for place in _places(entry, f"router_policy.{key}[{index}]", layers, experts)
        )
        for key, entries in (("ban", given.ban), ("pin", given.pin), ("allow", given.allow))
    )
    temperature: Any = given.temperature
    least, most = TEMPERATURES
    for number in temperature if isinstance(temperature, list) else [1.0 if temperature is None else temperature]:
        if not least <= number <= most:
            name = "router_policy.temperature"
            raise invalid(f"{name} must be between {least:g} and {most:g}, not {number}.", name)
    if isinstance(temperature, list):
        temperature = tuple(temperature)
    return NamedPolicy(tuple(boost), ban, given.k, given.renormalize, pin, allow, temperature)


def described(policy: Policy, config: ModelConfig) -> dict[str, Any]:
    """A policy as JSON, for clients that ask what the server does by default."""
    from olmoe.runner.policy_file import NamedPolicy, named, to_json

    return to_json(policy if isinstance(policy, NamedPolicy) else named(policy.resolve(config)))


def _places(entry: ExpertChoice, where: str, layers: int, experts: int) -> Iterator[tuple[int | None, int]]:
    """(layer, expert) of each expert that an entry names."""
    if (entry.expert is None) == (entry.experts is None):
        raise invalid(f"{where} must have either expert or experts.", f"{where}.expert")
    chosen: Sequence[int] = [entry.expert] if entry.experts is None else entry.experts  # type: ignore[list-item]
    name = f"{where}.{'expert' if entry.experts is None else 'experts'}"
    for expert in chosen:
        if not 0 <= expert < experts:
            raise invalid(f"{name} is {expert}, but experts are 0 to {experts - 1}.", name)
    if entry.layer is not None and not 0 <= entry.layer < layers:
        raise invalid(f"{where}.layer is {entry.layer}, but layers are 0 to {layers - 1}.", f"{where}.layer")
    return ((entry.layer, expert) for expert in chosen)
