"""What a caller asks for and gets back: sampling parameters and completions. No torch."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from olmoe.errors import UserError, shown

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The command line has the same defaults.

    - `max_new_tokens`: the most tokens to generate (256).
    - `temperature`: 0 takes the most probable token; above, logits are divided by it and sampled.
    - `top_k`: only the k most probable tokens (0: all). `top_p`: the fewest tokens whose probabilities sum
      to p (1: all). `min_p`: tokens of at least p times the most probable one's probability (0: all).
    - `repetition_penalty`: above 1, logits of tokens already in prompt or text are divided (if positive) or
      multiplied (if negative) by it (Keskar et al. 2019).
    - `presence_penalty`, `frequency_penalty`: subtracted from logits of tokens already in the text (not the prompt),
      once and for each time that they occur, as in OpenAI's interface.
    - `logit_bias`: added to the logits of these ids; -inf bans a token.
    - `seed`: the same seed gives the same text, in a batch or alone; None draws a new one.
    - `stop`: the text ends before the first of these strings. `ignore_eos`: do not end at EOS ids.
    - `logprobs`: report the log-probability of every generated token, and of this many of the likeliest ones in its
      place; None reports none.

    None for any of them is its default. Whole numbers and numbers may be numpy's. Raises `UserError` for values of
    other types or outside their ranges.
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

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                value = each.default
            if value is not None:  # which is the default of `logit_bias`, `seed` and `logprobs`
                value = _checked(each.name, value)
            object.__setattr__(self, each.name, value)


def _checked(name: str, value: object) -> Any:
    """The value as the parameter `name` holds it. Raises `UserError` for one of another type or out of range."""
    kind, read, allowed, rule = _RULES[name]
    try:
        result = read(value)
    except (TypeError, OverflowError):
        raise UserError(f"{name} must be {kind}, not {shown(value)}.") from None
    if not allowed(result):
        raise UserError(f"{name} must be {rule}, not {shown(result)}.")
    return result


def whole_number(name: str, value: object, *, least: int) -> int:
    """The value of an argument `name`. Raises `UserError` if it is no whole number or below `least`."""
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
    numpy = sys.modules.get("numpy")  # not imported for this: whoever passes its bool has it
    if not isinstance(value, bool) and (numpy is None or not isinstance(value, numpy.bool_)):
        raise TypeError
    return bool(value)


def _texts(value: object) -> Sequence[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes | bytearray | memoryview | Mapping) or not isinstance(value, Iterable):
        raise TypeError
    return list(value) if isinstance(value, list) else tuple(value)


def _biases(value: object) -> dict[int, float]:
    """Ids, perhaps written as strings (JSON has no other keys), to numbers that may be added to a logit."""
    if not isinstance(value, Mapping):
        raise TypeError
    return {int(i) if isinstance(i, str) and i.isdecimal() else _whole(i): _number(x) for i, x in value.items()}


# Of each parameter: what type it has, how that is read, which of the values read are allowed, and that in words.
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
}


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a generated token was: `logprob` is the natural logarithm of its probability.

    `top` are the likeliest tokens at its position by falling probability, id to log-probability, as many as
    `SamplingParams.logprobs` asks for. All are the model's own: before temperature, penalty and filters.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass
class Timings:
    """Wall seconds of one text: waiting for texts before it, its prompt, its tokens.

    Prompts that went through the network together took `prefill_seconds` together. What the reader of a stream
    does with the text is not counted.
    """

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        """All of them."""
        return self.queue_seconds + self.prefill_seconds + self.decode_seconds


@dataclass
class Completion:
    """One text, with what it took.

    `token_ids` are all generated ids, a final EOS included; `text` ends before any stop string. `finish_reason` is
    "eos" (the model ended the text), "stop" (a stop string), "length" (`max_new_tokens`, or the end of the context)
    or "cancelled" (its stream was left). `logprobs`, if asked for, has an entry for each of `token_ids`. Two
    completions are equal whatever time they took.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None
    timings: Timings = field(default_factory=Timings, compare=False)


@dataclass
class Statistics:
    """What one call took: tokens and wall seconds, prompt processing and generation apart."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_tokens: int = 0  # new tokens less the first of each text, which prefill yields
    decode_seconds: float = 0.0
    finished: int = 0  # texts


@dataclass(eq=False)  # two that look alike are two
class Request:
    """A prompt in progress: its ids, its parameters, and what has been generated."""

    prompt_ids: list[int]
    params: SamplingParams
    limit: int  # most tokens to generate, within the model's context
    where: str = ""  # its index in the batch for messages, as `in_batch` takes it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def most_tokens(self) -> int:
        """How long the sequence can grow, its prompt included."""
        return len(self.prompt_ids) + self.limit

    def completion(self, text: str) -> Completion:
        """What has become of it; "cancelled" if it has not finished."""
        return Completion(
            text,
            list(self.token_ids),
            self.finish_reason or "cancelled",
            len(self.prompt_ids),
            None if self.params.logprobs is None else list(self.logprobs),
            self.timings,
        )


def in_batch(error: UserError, where: str) -> UserError:
    """The same error, saying in which of several prompts: `where` is "prompts[3]", or empty for a single one."""
    return type(error)(f"{str(error).rstrip('.')} ({where}).") if where else error
