"""Chooses the next tokens of all requests in progress, so that each samples in a batch as it would alone."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from olmoe import ops
from olmoe.engine.request import Request
from olmoe.ops import AUTO, SamplingRow, SamplingStatus

_ERRORS = {
    SamplingStatus.NOT_FINITE: (
        "The model's logits are not finite: its weights are broken, or overflow in float16; try dtype float32."
    ),
    SamplingStatus.NOTHING_ALLOWED: "No token is left to choose: logit_bias or a mask bans all; allow at least one.",
}


class Choice(NamedTuple):
    """The next token of one request, or the sentence in `error` that says why there is none (then the id is -1).

    `logprob` and `top`, ids to log-probabilities by falling probability, are what `SamplingParams.logprobs` asks for:
    the model's own, before temperature, penalties, biases and filters.
    """

    token_id: int
    logprob: float | None = None
    top: dict[int, float] | None = None
    error: str | None = None


class Sampler:
    """Chooses for any requests, in any order and combination: each token depends only on its own request.

    `allowed` is the tokenizer's number of ids: rows of the output head beyond it are padding, which was
    never trained, and can never be chosen.
    """

    def __init__(self, allowed: int, backend: str = AUTO) -> None:
        self._allowed, self._backend = allowed, backend
        self._rows: WeakKeyDictionary[Request, SamplingRow] = WeakKeyDictionary()

    def choose_rows(
        self, logits: Tensor, requests: Sequence[Request], masks: Sequence[Tensor | None] | None = None
    ) -> list[Choice]:
        """The next token of each request, which the caller adds to its `token_ids`. logits (B, V).

        `masks` are the tokens that each may have, as in `SamplingRow.mask`; None allows all.
        """
        rows = [self._row(request) for request in requests]
        for row, mask in zip(rows, masks or [None] * len(rows), strict=True):
            row.mask = mask
        samples = ops.sample(logits.float().cpu(), rows, self._allowed, backend=self._backend)
        return [_choice(row, *values) for row, *values in zip(rows, *(t.tolist() for t in samples), strict=True)]

    def _row(self, request: Request) -> SamplingRow:
        """What the operation needs to know about a request, brought up to date."""
        row = self._rows.get(request)
        if row is None:
            row = self._rows[request] = _new_row(request)
        row.ids.extend(request.token_ids[len(row.ids) - row.prompt_length :])
        row.position = len(request.token_ids)
        return row


def _new_row(request: Request) -> SamplingRow:
    params = request.params
    biases = params.logit_bias or {}
    return SamplingRow(
        temperature=float(params.temperature),
        top_k=int(params.top_k),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        repetition_penalty=float(params.repetition_penalty),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        bias_ids=array("q", biases.keys()),
        biases=array("d", biases.values()),
        # From the operating system: torch's global generator is not involved.
        seed=secrets.randbits(63) if params.seed is None else int(params.seed),
        logprobs=params.logprobs,
        ids=array("q", request.prompt_ids),
        prompt_length=len(request.prompt_ids),
    )


def _choice(
    row: SamplingRow, token_id: int, status: int, logprob: float, top_ids: list[int], top_logprobs: list[float]
) -> Choice:
    if status != SamplingStatus.CHOSEN:
        return Choice(token_id, error=_ERRORS[SamplingStatus(status)])
    if row.logprobs is None:
        return Choice(token_id)
    top = {i: value for i, value in zip(top_ids, top_logprobs, strict=True) if i >= 0}
    return Choice(token_id, logprob, top)
