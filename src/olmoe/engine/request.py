"""What a caller asks for and gets back: sampling parameters and completions. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from olmoe.errors import UserError

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    - `temperature`: 0 takes the most probable token; above, logits are divided by it and sampled.
    - `top_k`: only the k most probable tokens (0: all). `top_p`: the fewest tokens whose probabilities sum
      to p (1: all). `min_p`: tokens of at least p times the most probable one's probability (0: all).
    - `repetition_penalty`: above 1, logits of tokens already in prompt or text are divided (if positive) or
      multiplied (if negative) by it (Keskar et al. 2019).
    - `seed`: the same seed gives the same text, in a batch or alone; None draws a new one.
    - `stop`: the text ends before the first of these strings. `ignore_eos`: do not end at EOS ids.

    Raises `UserError` for values outside their ranges.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 for all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "made of non-empty strings"),
        ]
        for name, valid, rule in rules:
            if not valid:
                raise UserError(f"{name} must be {rule}, not {getattr(self, name)!r}.")


@dataclass
class Completion:
    """One finished text.

    `token_ids` are all generated ids, a final EOS included; `text` ends before any stop string.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class Statistics:
    """What one call took: tokens and wall seconds, prompt processing and generation apart."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_tokens: int = 0  # new tokens less the first of each text, which prefill yields
    decode_seconds: float = 0.0


@dataclass
class Request:
    """A prompt in progress: its ids, its parameters, and what has been generated."""

    prompt_ids: list[int]
    params: SamplingParams
    limit: int  # most tokens to generate, within the model's context
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
