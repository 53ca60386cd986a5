"""transformers' auxiliary loss of OLMoE, which pools all layers before it multiplies.

    aux = E sum_e f_e P_e,   f_e = mean over layers and tokens of "expert e was chosen" (sums to K),
                             P_e = mean over layers and tokens of p_e

Its minimum is K (8 for OLMoE), and layers can cancel each other. OLMoE was trained with another loss, per
layer and with minimum 1: `olmoe.train.losses`.

Shapes legend: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pooled_load_balancing(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """The loss above. router_logits: (N, E) a layer; attention_mask (B, T) leaves padding out of both means."""
    device = router_logits[0].device
    weight_N = None if attention_mask is None else attention_mask.reshape(-1).to(device, torch.float32)
    chosen_E = torch.zeros(num_experts, device=device)
    probability_E = torch.zeros(num_experts, device=device)
    total = torch.zeros((), device=device)
    for logits_NE in router_logits:
        p_NE = logits_NE.to(device).softmax(dim=-1)
        ids_NK = p_NE.topk(top_k, dim=-1).indices
        ones_N = torch.ones(p_NE.shape[0], device=device) if weight_N is None else weight_N
        chosen_E = chosen_E.index_add(0, ids_NK.flatten(), ones_N.repeat_interleave(top_k))
        probability_E = probability_E + (p_NE.float() * ones_N.unsqueeze(-1)).sum(dim=0)
        total = total + ones_N.sum()
    return num_experts * (chosen_E / total * (probability_E / total)).sum()
