"""OLMoE's training objective: cross-entropy and the two router losses of `router_losses`.

    loss = CE + load_balancing * LB + router_z * Z

Shapes legend: B windows, T positions, D hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import CausalLM
from olmoe.model.router_losses import load_balancing, router_z, tokens_per_expert
from olmoe.train.config import LossConfig
from olmoe.train.document_mask import positions_and_attention
from olmoe.train.router_margins import router_margins

IGNORE = -100


class Losses(NamedTuple):
    """One microbatch's objective (what backward runs on) and its parts, detached, unweighted."""

    objective: Tensor
    cross_entropy: Tensor
    load_balancing: Tensor
    router_z: Tensor
    counts_LE: Tensor  # tokens each expert received, by layer
    margins_L2: Tensor  # `router_margins` of each layer


def objective(
    model: CausalLM,
    windows: Tensor,
    config: LossConfig,
    positions_in_step: int,
    microbatches: int,
    count: Callable[[Tensor], Tensor] | None = None,
    eos_id: int | None = None,
    trained_B: Tensor | None = None,
) -> Losses:
    """The share of one microbatch in a step's loss. windows (B, T) of ids; each predicts its own next ids.

    The cross-entropy is summed and divided by all positions of the step, the last of each window included,
    although it predicts nothing (the training code's denominator); the auxiliary losses are means over
    microbatches. `count` may turn the tokens that each expert received here, by layer, into those that load balancing
    looks at, such as all ranks' together. With `eos_id`, documents that it ends are isolated from each other (what it
    predicts is still how the next one begins). The predictions of windows for which `trained_B` is false are not
    trained.
    """
    positions, attend = positions_and_attention(windows, eos_id, model.lm_head.products)
    output = model(windows, positions, attend)
    labels = torch.full_like(windows, IGNORE)
    labels[:, :-1] = windows[:, 1:]
    if trained_B is not None:
        labels[~trained_B] = IGNORE
    summed = ops.linear_cross_entropy(
        output.hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), IGNORE, products=model.lm_head.products
    )
    cross_entropy = summed / positions_in_step
    counts_LE = torch.stack([tokens_per_expert(router) for router in output.routers])
    balance = load_balancing(output.routers, counts_LE=counts_LE if count is None else count(counts_LE))
    z = router_z(output.routers)
    total = cross_entropy + (config.load_balancing * balance + config.router_z * z) / microbatches
    margins_L2 = torch.stack([router_margins(router) for router in output.routers])
    return Losses(total, cross_entropy.detach(), balance.detach(), z.detach(), counts_LE, margins_L2)
