"""Types that the operations exchange."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class SortedRows(NamedTuple):
    """The M = N*K routed rows of N tokens, ordered by expert (stable: ties by token).

    - `order_M`: sorted row -> flat row n*K + k.
    - `token_ids_M`: sorted row -> token n.
    - `position_NK`: (token, slot) -> sorted row; the inverse of `order_M`.
    - `offsets_E` (E+1,): the rows of expert e are `offsets_E[e] : offsets_E[e+1]`.
    """

    order_M: Tensor
    token_ids_M: Tensor
    position_NK: Tensor
    offsets_E: Tensor


def _ints() -> array[int]:
    return array("q")


def _floats() -> array[float]:
    return array("d")


@dataclass(kw_only=True)
class SamplingRow:
    """How the next token of one text is chosen by `ops.sample`; the defaults take the most probable one.

    - `repetition_penalty`: scores of ids in prompt or text are divided by it if positive, else multiplied.
    - `presence_penalty`, `frequency_penalty`: subtracted from the scores of ids in the text, once, or per occurrence.
    - `bias_ids`, `biases`: added to single scores; -inf bans a token.
    - `mask`: int32 words (V/32 rounded up), or None; only tokens whose bit (i % 32 of word i / 32) is set are allowed.
    - `temperature`: 0 takes the most probable token; otherwise scores are divided by it and a token is drawn.
    - `top_k`: the k highest scores and those equal to the last of them (0: all).
    - `top_p`: by falling probability (ties: the lower id first), those preceded by a sum of less than p (1: all).
    - `min_p`: tokens of at least p times the most probable one's probability (0: all).
    - `seed` (below 2^64), `position`: which random number draws; a text counts its tokens with `position`.
    - `logprobs`: report the chosen token's log-probability and those of this many likeliest tokens; None: none at all.
    - `ids`: prompt and text; the first `prompt_length` are the prompt. Ids that cannot be chosen are ignored.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias_ids: array[int] = field(default_factory=_ints)
    biases: array[float] = field(default_factory=_floats)
    mask: Tensor | None = None
    seed: int = 0
    position: int = 0
    logprobs: int | None = None
    ids: array[int] = field(default_factory=_ints)
    prompt_length: int = 0


class SamplingStatus(IntEnum):
    """Whether a row of `ops.sample` has a token, or why it has none."""

    CHOSEN = 0
    NOT_FINITE = 1  # a logit is infinite or NaN: no choice would mean anything
    NOTHING_ALLOWED = 2  # mask or biases ban every token


class Samples(NamedTuple):
    """The results of `ops.sample` for B rows, on the CPU.

    - `ids` (B,): the chosen tokens, -1 where `status` (B,) is not `SamplingStatus.CHOSEN`.
    - `logprobs` (B,): their log-probabilities by the unmodified logits, NaN if not requested.
    - `top_ids`, `top_logprobs` (B, n): by falling probability (ties: the lower id first) the likeliest tokens, n the
      most that a row asks for; -1 and NaN beyond what a row asks for or has.
    """

    ids: Tensor
    status: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def room(cls, rows: list[SamplingRow], allowed: int) -> Samples:
        """Memory for the results of `rows`, all of which is to be written."""
        b, most = len(rows), min(max((row.logprobs or 0 for row in rows), default=0), allowed)
        return cls(
            ids=torch.empty(b, dtype=torch.long),
            status=torch.empty(b, dtype=torch.int32),
            logprobs=torch.empty(b),
            top_ids=torch.empty((b, most), dtype=torch.long),
            top_logprobs=torch.empty((b, most)),
        )

    @classmethod
    def unfilled(cls, rows: list[SamplingRow], allowed: int) -> Samples:
        """Room for the results of `rows`, which so far have nothing."""
        room = cls.room(rows, allowed)
        for numbers, nothing in zip(room, (-1, 0, torch.nan, -1, torch.nan), strict=True):
            numbers.fill_(nothing)
        return room


class RoutePolicy(NamedTuple):
    """Changes to what one layer's router chooses for N tokens; with one row instead of N, for all of them.

    `bias` (N, E) fp32 is added to the logits (minus infinity: not this expert), `top_k` (N) experts are chosen, `width`
    being the largest of these, and where `renormalize` (N, bool) their weights are divided by their sum. Experts that
    are `pinned` (N, E, bool) are among the chosen. Weights are the probabilities of the logits divided by `temperature`
    (N) fp32; the choice is that without it.
    """

    bias: Tensor
    top_k: Tensor
    renormalize: Tensor
    width: int
    pinned: Tensor | None = None
    temperature: Tensor | None = None
