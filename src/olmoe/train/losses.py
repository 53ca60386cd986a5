"""OLMoE's training objective, exactly as its training code computes it.

    loss = CE + load_balancing * LB + router_z * Z

Paper (arXiv 2409.02060) Eq. 3 and 4; the training code (megablocks fork, `batched_load_balancing_loss`)
differs from them in a factor 1/K each, and is what is followed here:

    LB = 1/L sum_l E sum_e (n_le / (N K)) mean_t p_lte         minimum 1, when the load is uniform
    Z  = 1/(L N K) sum_l,t (log sum_e exp logit_lte)^2         note the 1/K: Eq. 4 at an eighth of the weight

over the L layers and the N tokens of one microbatch. transformers' own auxiliary loss pools all layers
before multiplying and does not divide by K (minimum K): the same coefficient is 8 times as strong there.

Shapes legend: N tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import CausalLM, RouterOutput, causal_attend
from olmoe.train.config import LossConfig

IGNORE = -100


class Losses(NamedTuple):
    """One microbatch's objective (what backward runs on) and its parts, detached, unweighted."""

    objective: Tensor
    cross_entropy: Tensor
    load_balancing: Tensor
    router_z: Tensor
    counts_LE: Tensor  # tokens each expert received, by layer


def load_balancing(routers: list[RouterOutput]) -> Tensor:
    """LB above: 1 when every layer's load is uniform. The counts carry no gradient."""
    total = routers[0].logits.new_zeros(())
    for router in routers:
        experts = router.logits.shape[1]
        counts_E = torch.bincount(router.expert_ids.flatten(), minlength=experts)
        share_E = counts_E / router.expert_ids.numel()
        total = total + experts * torch.dot(share_E, router.logits.softmax(dim=-1).mean(dim=0))
    return total / len(routers)


def router_z(routers: list[RouterOutput]) -> Tensor:
    """Z above: the mean squared log-partition of the routers, divided by K as the training code does."""
    total = routers[0].logits.new_zeros(())
    for router in routers:
        total = total + router.logits.logsumexp(dim=-1).square().sum() / router.expert_ids.numel()
    return total / len(routers)


def objective(
    model: CausalLM, windows: Tensor, config: LossConfig, positions_in_step: int, microbatches: int
) -> Losses:
    """The share of one microbatch in a step's loss. windows (B, T) of ids; each predicts its own next ids.

    The cross-entropy is summed and divided by all positions of the step, the last of each window included,
    although it predicts nothing (the training code's denominator); the auxiliary losses are means over
    microbatches.
    """
    b, t = windows.shape
    positions = torch.arange(t, device=windows.device).expand(b, t)
    output = model(windows, positions, causal_attend)
    labels = torch.full_like(windows, IGNORE)
    labels[:, :-1] = windows[:, 1:]
    summed = ops.linear_cross_entropy(output.hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), IGNORE)
    cross_entropy = summed / positions_in_step
    balance, z = load_balancing(output.routers), router_z(output.routers)
    total = cross_entropy + (config.load_balancing * balance + config.router_z * z) / microbatches
    counts_LE = torch.stack(
        [torch.bincount(r.expert_ids.flatten(), minlength=r.logits.shape[1]) for r in output.routers]
    )
    return Losses(total, cross_entropy.detach(), balance.detach(), z.detach(), counts_LE)
