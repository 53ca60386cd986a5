"""The two auxiliary losses of OLMoE's routers, as its training code computes them.

Paper (arXiv 2409.02060) Eq. 3 and 4; the training code (megablocks fork, `batched_load_balancing_loss`)
differs from them in a factor 1/K each, and is what is followed here:

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


def load_balancing(routers: Sequence[RouterOutput], mask_N: Tensor | None = None) -> Tensor:
    """LB above: 1 when every layer's load is uniform. The counts carry no gradient.

    `mask_N` is true for the tokens that count; the others (padding) are left out of both means.
    """
    total = routers[0].logits.new_zeros(())
    for router in routers:
        logits_NE, ids_NK = router.logits, router.expert_ids
        if mask_N is not None:
            logits_NE, ids_NK = logits_NE[mask_N], ids_NK[mask_N]
        experts = logits_NE.shape[1]
        counts_E = torch.bincount(ids_NK.flatten(), minlength=experts)
        share_E = counts_E / ids_NK.numel()
        total = total + experts * torch.dot(share_E, logits_NE.softmax(dim=-1).mean(dim=0))
    return total / len(routers)


def router_z(routers: Sequence[RouterOutput], mask_N: Tensor | None = None) -> Tensor:
    """Z above: the mean squared log-partition of the routers, divided by K as the training code does."""
    total = routers[0].logits.new_zeros(())
    for router in routers:
        logits_NE = router.logits if mask_N is None else router.logits[mask_N]
        slots = logits_NE.shape[0] * router.expert_ids.shape[1]
        total = total + logits_NE.logsumexp(dim=-1).square().sum() / slots
    return total / len(routers)
