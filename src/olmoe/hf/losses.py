"""The auxiliary losses of the transformers face: transformers' own, and OLMoE's by configuration.

transformers' loss pools all layers before it multiplies:

    aux = E sum_e f_e P_e,   f_e = mean over layers and tokens of "expert e was chosen" (sums to K),
                             P_e = mean over layers and tokens of p_e

Its minimum is K (8 for OLMoE), and layers can cancel each other. OLMoE was trained with other losses, per
layer and with minimum 1: `olmoe.model.router_losses`.

If gradients are accumulated, or averaged over processes, each batch adds its share of the step (`share_of_step`),
like its cross-entropy. transformers adds the whole loss for every batch, so there its weight grows with their number.

Shapes legend: B batch, T sequence, N tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from olmoe.hf.config import OlmoeConfig
from olmoe.model import RouterOutput
from olmoe.model.router_losses import load_balancing, router_z
from olmoe.ops import route

IGNORE = -100  # the label of tokens that are left out of the loss


def pooled_load_balancing(
    router_logits: Sequence[Tensor], num_experts: int, top_k: int, attention_mask: Tensor | None = None
) -> Tensor:
    """The loss above. router_logits: (N, E) per layer; attention_mask (B, T) leaves padding out of both means."""
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


def router_losses(model: Any, router_logits: Sequence[Tensor], attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The unweighted load-balancing loss that the configuration chooses, and what it adds to the training loss.

    `model` has coefficient and counts as attributes, like transformers' models; router_logits: (N, E) per layer;
    attention_mask (B, T) or None.
    """
    config: OlmoeConfig = model.config
    if config.router_loss_kind == "pooled":
        pooled = pooled_load_balancing(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
        return pooled, model.router_aux_loss_coef * pooled
    device = router_logits[0].device
    mask_N = None if attention_mask is None else attention_mask.reshape(-1).to(device).bool()
    routers = [
        RouterOutput(logits_NE, *route(logits_NE, model.num_experts_per_tok))
        for logits_NE in (logits.to(device) for logits in router_logits)
    ]
    balance = load_balancing(routers, mask_N)
    total = model.router_aux_loss_coef * balance
    if config.router_z_coefficient:
        total = total + config.router_z_coefficient * router_z(routers, mask_N)
    return balance, total


def share_of_step(labels: Tensor, options: Mapping[str, Any]) -> Tensor | float:
    """The share of this batch among all batches of an optimizer step, for losses that are means over its tokens.

    labels (B, T); `options` are what the loss function gets. With `num_items_in_batch` it divides the batch's summed
    cross-entropy by the predicted tokens of the step, on all processes: the share is how many of them are here.
    Without it the loss is the mean over this batch, and a caller that accumulates gradients divides it: 1.
    """
    items = options.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = options.get("shift_labels")
    predicted = labels[..., 1:] if shifted is None else shifted
    count = (predicted != options.get("ignore_index", IGNORE)).sum()
    return count / (items.to(count.device) if isinstance(items, Tensor) else items)
