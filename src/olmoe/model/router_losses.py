"""The two auxiliary losses of OLMoE's routers, as its training code computes them.

Paper (arXiv 2409.02060) Eq. 3 and 4; the training code (megablocks fork, `batched_load_balancing_loss`)
differs from each by a factor of 1/K, and is what we follow here:

    LB = 1/L sum_l E sum_e (n_le / (N K)) mean_t p_lte         minimum 1, when the load is uniform
    Z  = 1/(L N K) sum_l,t (log sum_e exp logit_lte)^2         note the 1/K: Eq. 4 at an eighth of the weight

over the L layers and the N tokens of one microbatch. transformers' own auxiliary loss pools all layers
before multiplying and does not divide by K (minimum K): the same coefficient is 8 times as strong there.

Shapes legend: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmoe.model import RouterOutput


def load_balancing(
    routers: Sequence[RouterOutput], mask_N: Tensor | None = None, counts_LE: Tensor | None = None
) -> Tensor:
    """LB above: 1 when every layer's load is uniform. The counts carry no gradient.

    `mask_N` is true for the tokens that count; the others (padding) are left out of both means. `counts_LE` may give
    the load: that of these tokens, if already known, or of a larger set of tokens.
    """
    total = routers[0].logits.new_zeros(())
    for layer, router in enumerate(routers):
        p_NE = _wide(router.logits).softmax(dim=-1)
        counts_E = tokens_per_expert(router, mask_N) if counts_LE is None else counts_LE[layer]
        share_E = counts_E / counts_E.sum()
        if mask_N is None:
            mean_E = p_NE.mean(dim=0)
        else:
            mean_E = torch.where(mask_N.unsqueeze(1), p_NE, 0.0).sum(dim=0) / mask_N.sum()
        total = total + p_NE.shape[1] * (share_E * mean_E).sum()
    return total / len(routers)


def router_z(routers: Sequence[RouterOutput], mask_N: Tensor | None = None) -> Tensor:
    """Z above: the mean squared log-partition of the routers, divided by K as in the training code."""
    total = routers[0].logits.new_zeros(())
    for router in routers:
        z_N = _wide(router.logits).logsumexp(dim=-1).square()
        count: Tensor | int = z_N.shape[0]
        if mask_N is not None:
            z_N, count = torch.where(mask_N, z_N, 0.0), mask_N.sum()
        total = total + z_N.sum() / (count * router.expert_ids.shape[1])
    return total / len(routers)


def tokens_per_expert(router: RouterOutput, mask_N: Tensor | None = None) -> Tensor:
    """How many of the tokens in the mask each expert received: (E,) integers."""
    ids_NK = router.expert_ids
    ones_NK = torch.ones_like(ids_NK) if mask_N is None else mask_N.to(ids_NK.dtype).unsqueeze(1).expand_as(ids_NK)
    zeros_E = ids_NK.new_zeros(router.logits.shape[1])
    return zeros_E.index_add(0, ids_NK.flatten(), ones_NK.flatten())


def _wide(logits: Tensor) -> Tensor:
    """At least fp32: routers of other kinds may score in half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
