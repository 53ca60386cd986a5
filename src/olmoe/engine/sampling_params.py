"""How the next token is chosen and when a text ends: `SamplingParams`. No torch."""

from __future__ import annotations

import copy
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from olmoe.errors import UserError, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from olmoe.runner.policy_file import AnyPolicy, Policy


class GrammarState(Protocol):
    """The state of one text in a `Grammar`."""

    finished: bool  # only the end may follow

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next: bit i of word w is token 32 w + i. EOS ids count if the text may end."""
        ...

    def accept(self, token_id: int) -> None:
        """Continue after a token that the mask allowed."""
        ...


class Grammar(Protocol):
    """A language that a text must belong to (see `olmoe.engine.structured`)."""

    def start(self) -> GrammarState:
        """The state before the first token."""
        ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The command line has the same defaults.

    - `max_new_tokens`: the most tokens to generate (256).
    - `temperature`: 0 chooses the most probable token; otherwise logits are divided by it and sampled.
    - `top_k`: only the k most probable tokens (0: all). `top_p`: the fewest tokens whose probabilities sum
      to p (1: all). `min_p`: tokens of at least p times the most probable one's probability (0: all).
    - `repetition_penalty`: above 1, logits of tokens already in prompt or text are divided (if positive) or
      multiplied (if negative) by it (Keskar et al. 2019).
    - `presence_penalty`, `frequency_penalty`: subtracted from logits of tokens already in the text (not the prompt),
      once, or once for each occurrence, as in OpenAI's interface.
    - `logit_bias`: added to the logits of these ids; -inf bans a token.
    - `seed`: the same seed gives the same text, in a batch or alone; None draws a new one.
    - `stop`: the text ends before the first of these strings. `ignore_eos`: do not end at EOS ids.
    - `stop_token_ids`: the text ends at one of these ids, which adds no text. `include_stop`: keep the stop string
      at the end of the text. `min_tokens`: no EOS and no stop id before this many tokens.
    - `logprobs`: report the log-probability of every generated token, and of this many of the likeliest ones at its
      position; None reports none. `prompt_logprobs`: the same for the tokens of the prompt.
    - `allowed_token_ids`: only these can be chosen. `grammar`: the text belongs to it.
    - `router_policy`: changes what routers choose for this text: a `RouterPolicy`, the path of a JSON file, or a
      mapping with the keys of one (see `olmoe.runner.policy_file`). If `LLM` has a policy, `RouterPolicy()` restores
      the model's own routing.
    - `routing`: report which experts predicted each token, with their weights; `prompt_routing`: also those of the
      prompt's tokens.

    None means the default for any of them. Numbers may be numpy's. Raises `UserError` for values of other types or
    outside their ranges.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    allowed_token_ids: Sequence[int] | None = None
    grammar: Grammar | None = None
    router_policy: AnyPolicy | None = None
    routing: bool = False
    prompt_routing: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                value = each.default
            if value is not None:  # None is the default of some
                value = _checked(each.name, value)
            object.__setattr__(self, each.name, value)

    def with_seed(self, seed: int | None) -> SamplingParams:
        """The same parameters with another seed. Everything else is shared, however large, and not checked again."""
        other = copy.copy(self)
        object.__setattr__(other, "seed", None if seed is None else _checked("seed", seed))
        return other


def _checked(name: str, value: object) -> Any:
    """The value as the parameter `name` stores it. Raises `UserError` for one of another type or out of range."""
    kind, read, allowed, rule = _RULES[name]
    try:
        result = read(value)
    except (TypeError, OverflowError):
        raise UserError(f"{name} must be {kind}, not {shown(value)}.") from None
    if not allowed(result):
        raise UserError(f"{name} must be {rule}, not {shown(result)}.")
    return result


def whole_number(name: str, value: object, *, least: int) -> int:
    """The value of an argument `name`. Raises `UserError` if it is not a whole number or is below `least`."""
    try:
        number = _whole(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UserError(f"{name} must be a whole number, at least {least}, not {shown(value)}.")
    return number


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # numpy's are among these
        raise TypeError
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _flag(value: object) -> bool:
    numpy = sys.modules.get("numpy")  # not imported for this: whoever passes its bool has imported it
    if not isinstance(value, bool) and (numpy is None or not isinstance(value, numpy.bool_)):
        raise TypeError
    return bool(value)


def _texts(value: object) -> Sequence[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise TypeError
    return list(value) if isinstance(value, list) else tuple(value)


def _ids(value: object) -> Sequence[int]:
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise TypeError
    return tuple(_whole(item) for item in value)


def _having(method: str) -> Callable[[object], Any]:
    """A reader that accepts objects with this method."""

    def read(value: object) -> Any:
        if not callable(getattr(value, method, None)):
            raise TypeError
        return value

    return read


def _policy(value: object) -> Policy:
    from olmoe.runner.policy_file import as_policy  # on demand: its package imports torch

    return as_policy(value)


def _biases(value: object) -> dict[int, float]:
    """A mapping from ids, perhaps strings (JSON has no other keys), to numbers that may be added to a logit."""
    if not isinstance(value, Mapping):
        raise TypeError
    return {int(i) if isinstance(i, str) and i.isdecimal() else _whole(i): _number(x) for i, x in value.items()}


# For each parameter: its type, how it is read, which of the values read are allowed, and the same in words.
_RULES: dict[str, tuple[str, Callable[[object], Any], Callable[[Any], bool], str]] = {
    "max_new_tokens": ("a whole number", _whole, lambda n: n >= 1, "at least 1"),
    "temperature": ("a number", _number, lambda x: 0 <= x < math.inf, "at least 0"),
    "top_k": ("a whole number", _whole, lambda n: n >= 0, "at least 0 (0 for all tokens)"),
    "top_p": ("a number", _number, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": ("a number", _number, lambda x: 0 <= x <= 1, "between 0 and 1"),
    "repetition_penalty": ("a number", _number, lambda x: 0 < x < math.inf, "above 0"),
    "presence_penalty": ("a number", _number, math.isfinite, "a finite number"),
    "frequency_penalty": ("a number", _number, math.isfinite, "a finite number"),
    "logit_bias": (
        "a mapping of token ids to numbers",
        _biases,
        lambda biases: all(0 <= i < 2**63 and x < math.inf for i, x in biases.items()),
        "a mapping of token ids to numbers, of which only -inf is not finite",
    ),
    "seed": ("a whole number", _whole, lambda n: 0 <= n < 2**63, "between 0 and 2^63 - 1"),
    "stop": (
        "a text or several",
        _texts,
        lambda texts: all(isinstance(s, str) and s for s in texts),
        "made of non-empty strings",
    ),
    "ignore_eos": ("True or False", _flag, lambda _: True, ""),
    "logprobs": ("a whole number", _whole, lambda n: n >= 0, "at least 0 (0 for the chosen tokens alone)"),
    "stop_token_ids": ("token ids", _ids, lambda ids: all(0 <= i < 2**63 for i in ids), "made of ids from 0"),
    "include_stop": ("True or False", _flag, lambda _: True, ""),
    "min_tokens": ("a whole number", _whole, lambda n: n >= 0, "at least 0"),
    "prompt_logprobs": ("a whole number", _whole, lambda n: n >= 0, "at least 0 (0 for the prompt's tokens alone)"),
    "allowed_token_ids": ("token ids", _ids, lambda ids: ids and all(0 <= i < 2**63 for i in ids), "at least one id"),
    "grammar": ("a Grammar", _having("start"), lambda _: True, ""),
    "router_policy": ("a RouterPolicy, a file or a mapping", _policy, lambda _: True, ""),
    "routing": ("True or False", _flag, lambda _: True, ""),
    "prompt_routing": ("True or False", _flag, lambda _: True, ""),
}
