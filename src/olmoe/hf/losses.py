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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmoe.hf.config import OlmoeConfig
from olmoe.model import RouterOutput
from olmoe.model.router_losses import load_balancing, router_z
from olmoe.ops import route

IGNORE = -100  # the label of tokens that are left out of the loss


@dataclass(frozen=True)
class WholeStep:
    """What all batches of an optimizer's step have together, on all ranks; see `step_balance`.

    `counts_LE` are the tokens that chose each expert of each layer.
    """

    counts_LE: Tensor
    tokens: int
    batches: int


def kept_tokens(logits_NE: Tensor, attention_mask: Tensor | None) -> Tensor:
    """1 for each token that counts, 0 for padding: (N,) integers."""
    if attention_mask is None:
        return torch.ones(logits_NE.shape[0], dtype=torch.int64, device=logits_NE.device)
    return attention_mask.reshape(-1).to(logits_NE.device).bool().long()


def pooled_load_balancing(
    router_logits: Sequence[Tensor],
    num_experts: int,
    top_k: int,
    attention_mask: Tensor | None = None,
    counts_LE: Tensor | None = None,
) -> Tensor:
    """The loss above. router_logits: (N, E) a layer; attention_mask (B, T) leaves padding out of both means.

    `counts_LE` may give the tokens that chose each expert, of more than these.
    """
    device = router_logits[0].device
    weight_N = kept_tokens(router_logits[0], attention_mask).float()
    chosen_E = torch.zeros(num_experts, device=device)
    probability_E = torch.zeros(num_experts, device=device)
    total = weight_N.sum() * len(router_logits)
    for logits in router_logits:
        p_NE = logits.to(device).softmax(dim=-1)
        ids_NK = p_NE.topk(top_k, dim=-1).indices
        chosen_E = chosen_E.index_add(0, ids_NK.flatten(), weight_N.repeat_interleave(top_k))
        probability_E = probability_E + (p_NE.float() * weight_N.unsqueeze(-1)).sum(dim=0)
    share_E = chosen_E / total
    if counts_LE is not None:
        share_E = counts_LE.sum(dim=0) / counts_LE.sum() * top_k
    return num_experts * (share_E * (probability_E / total)).sum()


class RouterLosses(NamedTuple):
    """The unweighted load-balancing loss that the configuration chooses, and what is added to the training loss."""

    balance: Tensor
    addition: Tensor


def router_losses(
    model: Any, router_logits: Sequence[Tensor], attention_mask: Tensor | None, step: WholeStep | None = None
) -> RouterLosses:
    """The losses of a batch. With `step` the load is the whole step's, and the batch counts by its tokens.

    `model` has coefficient and counts as attributes, like transformers' models; router_logits: (N, E) per layer;
    attention_mask (B, T) or None.
    """
    balance, z = _unweighted(model, router_logits, attention_mask, None if step is None else step.counts_LE)
    if step is not None:  # so that the mean over all batches of the step is the step's
        weight = kept_tokens(router_logits[0], attention_mask).sum() * (step.batches / max(step.tokens, 1))
        balance, z = balance * weight, None if z is None else z * weight
    addition = model.router_aux_loss_coef * balance
    return RouterLosses(balance, addition if z is None else addition + model.config.router_z_coefficient * z)


def _unweighted(
    model: Any, router_logits: Sequence[Tensor], attention_mask: Tensor | None, counts_LE: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The load-balancing loss, and the z-loss if the configuration has one."""
    config: OlmoeConfig = model.config
    if config.router_loss_kind == "pooled":
        counts = model.num_experts, model.num_experts_per_tok
        return pooled_load_balancing(router_logits, *counts, attention_mask, counts_LE), None
    device = router_logits[0].device
    mask_N = None if attention_mask is None else kept_tokens(router_logits[0], attention_mask).bool()
    routers = [
        RouterOutput(logits_NE, *route(logits_NE, model.num_experts_per_tok))
        for logits_NE in (logits.to(device) for logits in router_logits)
    ]
    balance = load_balancing(routers, mask_N, counts_LE)
    return balance, router_z(routers, mask_N) if config.router_z_coefficient else None


def share_of_step(labels: Tensor, options: Mapping[str, Any], step: WholeStep | None = None) -> Tensor | float:
    """What this batch counts for among all batches of an optimizer's step, for losses that are means over its tokens.

    labels (B, T); `options` are what the loss function gets. With `num_items_in_batch` it divides the batch's summed
    cross-entropy by the predicted tokens of the step, on all processes: the share is how many of them are here, or
    with `step` the share of a mean over batches. Without it the loss is the mean over this batch, and a caller that
    accumulates gradients divides it: 1.
    """
    items = options.get("num_items_in_batch")
    if items is None:
        return 1.0
    if step is not None:
        return 1 / step.batches
    shifted = options.get("shift_labels")
    predicted = labels[..., 1:] if shifted is None else shifted
    count = (predicted != options.get("ignore_index", IGNORE)).sum()
    return count / (items.to(count.device) if isinstance(items, Tensor) else items)
