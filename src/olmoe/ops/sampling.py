"""The definition of `sample`, the choice of the next token, in plain torch: written to be audited, not fast.

Every row is computed by itself, from its own logits and `SamplingRow` alone; random numbers are counter-based, so that
the order of requests does not change a text. The C++ kernels use fp32 and double in the same places: their filters cut
at the same place, except for the rounding of the exponential.

Shapes legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmoe.ops.dispatch import register
from olmoe.ops.types import Samples, SamplingRow, SamplingStatus


@register("sample", "torch")
@register("sample", "reference")
def sample(logits: Tensor, rows: list[SamplingRow], allowed: int) -> Samples:
    """Scores, filters, then a draw; or the highest score (ties: the lower id). logits (B, V), the first `allowed` of V.

    Log-probabilities are those of the unmodified logits.
    """
    samples = Samples.unfilled(rows, allowed)
    for r, row in enumerate(rows):
        raw = logits[r, :allowed].detach().float().cpu()
        scores = masked(biased(penalized(raw, row), row), row)
        if not raw.isfinite().all():
            samples.status[r] = SamplingStatus.NOT_FINITE
            continue
        if scores.max() == -torch.inf:
            samples.status[r] = SamplingStatus.NOTHING_ALLOWED
            continue
        if row.temperature == 0:
            samples.ids[r] = (scores == scores.max()).nonzero()[0]
        else:
            samples.ids[r] = drawn(filtered(scores, row), uniform(row.seed, row.position))
        if row.logprobs is not None:
            logprobs, order = raw.double().log_softmax(-1), raw.sort(descending=True, stable=True).indices
            samples.logprobs[r] = logprobs[samples.ids[r]]
            top = order[: row.logprobs]
            samples.top_ids[r, : len(top)], samples.top_logprobs[r, : len(top)] = top, logprobs[top].float()
    return samples


def _finite(scores: Tensor) -> Tensor:
    """fp32 without infinities, which an extreme penalty or bias must not make. (V,) -> (V,)."""
    limit = torch.finfo(torch.float32).max
    return scores.clamp(-limit, limit).float()


def penalized(scores: Tensor, row: SamplingRow) -> Tensor:
    """Repetition penalty of ids in prompt or text, then presence and frequency penalties of the text. (V,) -> (V,)."""
    v, ids, text = len(scores), list(row.ids), list(row.ids)[row.prompt_length :]
    seen_V = torch.tensor([i for i in ids if 0 <= i < v], dtype=torch.long).bincount(minlength=v) > 0
    count_V = torch.tensor([i for i in text if 0 <= i < v], dtype=torch.long).bincount(minlength=v)
    old = scores.double()
    repeated = torch.where(old > 0, old / row.repetition_penalty, old * row.repetition_penalty)
    scores = torch.where(seen_V, _finite(repeated), scores)
    lowered = scores.double() - (row.presence_penalty + row.frequency_penalty * count_V.double())
    return torch.where(count_V > 0, _finite(lowered), scores)


def biased(scores: Tensor, row: SamplingRow) -> Tensor:
    """Biases added to single scores; -inf is unchanged. (V,) -> (V,)."""
    scores = scores.clone()
    for i, bias in zip(row.bias_ids, row.biases, strict=True):
        if 0 <= i < len(scores):
            scores[i] = bias if bias == -math.inf else _finite(scores[i].double() + bias)
    return scores


def masked(scores: Tensor, row: SamplingRow) -> Tensor:
    """-inf for tokens whose bit of the mask is not set. (V,) -> (V,)."""
    if row.mask is None:
        return scores
    bits = row.mask.cpu().unsqueeze(1) >> torch.arange(32, dtype=torch.int32) & 1  # (V/32, 32)
    return scores.masked_fill(bits.view(-1)[: len(scores)] == 0, -torch.inf)


def filtered(scores: Tensor, row: SamplingRow) -> Tensor:
    """Temperature, then top-k, top-p, min-p; what they exclude becomes -inf. (V,) -> (V,).

    The order is transformers'. At least one token always remains. Scores are taken relative to the
    largest, which changes no probability and keeps it finite at any temperature.
    """
    number = torch.finfo(torch.float32)
    scores = (scores - scores.max()) / min(max(row.temperature, number.tiny), number.max)
    if 0 < row.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(row.top_k).values[-1], -torch.inf)
    least = torch.tensor(math.log(row.min_p) if row.min_p > 0 else -math.inf)  # the largest score is 0
    if row.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        shares = ordered.double().exp()
        through = shares.cumsum(dim=-1)
        excluded = through - shares >= row.top_p * through[-1]
        excluded[0] = False
        scores = scores.index_fill(0, order[excluded], -torch.inf)
    return scores.masked_fill(scores < least, -torch.inf)


def drawn(scores: Tensor, u: float) -> int:
    """The first token at which the probabilities up to it, in the order of ids, exceed `u`. scores (V,)."""
    shares = scores.double().exp()
    through = shares.cumsum(dim=-1)
    token_id = int(torch.searchsorted(through, u * through[-1], right=True))
    return min(token_id, int(shares.nonzero()[-1]))  # no token exceeds it where the product is rounded up


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for each seed and position: Philox 4x32-10 (Salmon et al. 2011).

    The position is the counter, the seed the key; the upper 53 of the first 64 bits are used.
    """
    word = 2**32
    a, b = philox((position % word, position // word, 0, 0), (seed % word, seed // word))[:2]
    return (a * word + b >> 11) / 2**53


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random words of 32 bits for a counter of four and a key of two."""
    word = 2**32
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            second // word ^ counter[1] ^ key[0],
            second % word,
            first // word ^ counter[3] ^ key[1],
            first % word,
        )
        key = ((key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word)
    return counter
