"""How probable a prompt's own tokens are: scoring, as evaluation harnesses need it.

Shapes legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmoe.engine.request import TokenLogprob


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], top: int, allowed: int) -> list[TokenLogprob]:
    """The log-probability of each token, and of the `top` likeliest at its position. logits (N, V) precede each token.

    Only the first `allowed` of V count, as in sampling: the rest is padding. A token beyond them gets -inf.
    """
    if not token_ids:
        return []
    logits = logits[:, :allowed].float().cpu()
    total_N = logits.double().logsumexp(dim=-1)
    ids = torch.tensor(token_ids)
    inside_N = ids < allowed
    own_N = logits.gather(1, ids.clamp(max=allowed - 1)[:, None])[:, 0].double() - total_N
    own_N = own_N.masked_fill(~inside_N, -torch.inf)
    values, places = logits.topk(min(top, allowed), dim=-1)
    best = zip(places.tolist(), (values.double() - total_N[:, None]).tolist(), strict=True)
    return [
        TokenLogprob(token_id, own, dict(zip(names, scores, strict=True)))
        for token_id, own, (names, scores) in zip(token_ids, own_N.tolist(), best, strict=True)
    ]
