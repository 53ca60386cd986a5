"""Choosing the next token from logits, one request at a time, so that a batch samples as its members would alone."""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.engine.request import SamplingParams, TokenLogprob
from olmoe.errors import UserError


class Sampler:
    """The sampling state of one request: its random generator.

    `allowed` is the tokenizer's number of ids: rows of the output head beyond it are padding, which was
    never trained, and can never be chosen.
    """

    def __init__(self, params: SamplingParams, allowed: int) -> None:
        self._params, self._allowed = params, allowed
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def choose(self, logits: Tensor, history: list[int]) -> int:
        """The next id. logits (V,) of one sequence; `history` is its prompt and text so far, for the penalty.

        Raises `UserError` if the logits are not finite: no choice among them would mean anything.
        """
        scores = logits.float().cpu()[: self._allowed].clone()
        if not scores.isfinite().all():
            raise UserError(
                "The model's logits are not finite: its weights are broken, or overflow in float16; try dtype float32."
            )
        if self._params.repetition_penalty != 1.0:
            penalize(scores, history, self._params.repetition_penalty)
        if self._params.temperature == 0.0:
            return int(scores.argmax())
        probabilities = filtered(scores, self._params).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def token_logprob(logits: Tensor, token_id: int, count: int, allowed: int) -> TokenLogprob:
    """How probable `token_id` and the `count` likeliest tokens were. logits (V,), of which `allowed` are tokens."""
    logprobs = logits.float().cpu()[:allowed].log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(token_id, float(logprobs[token_id]), dict(zip(ids.tolist(), values.tolist(), strict=True)))


def penalize(scores: Tensor, history: list[int], penalty: float) -> None:
    """Lower, in place, the scores (V,) of ids in `history`: positive ones divided, negative ones multiplied."""
    seen = torch.tensor(sorted({i for i in history if 0 <= i < len(scores)}), dtype=torch.long)
    old = scores[seen]
    limit = torch.finfo(scores.dtype).max  # an extreme penalty must not make an infinite score
    scores[seen] = torch.where(old > 0, old / penalty, old * penalty).clamp(-limit, limit)


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top-k, top-p, min-p; what they exclude becomes -inf. scores (V,) -> (V,).

    The order is transformers'. At least one token always remains. Scores are taken relative to the
    largest, which changes no probability and keeps it finite at any temperature.
    """
    number = torch.finfo(scores.dtype)
    scores = (scores - scores.max()) / min(max(params.temperature, number.tiny), number.max)
    if 0 < params.top_k < len(scores):
        kth = scores.topk(params.top_k).values[-1]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if params.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays if those before it have not yet reached p.
        excluded = probabilities.cumsum(dim=-1) - probabilities >= params.top_p
        excluded[0] = False
        scores = scores.index_fill(0, order[excluded], float("-inf"))
    if params.min_p > 0.0:
        probabilities = scores.softmax(dim=-1)
        scores = scores.masked_fill(probabilities < params.min_p * probabilities.max(), float("-inf"))
    return scores
