"""Losses of preferences, from summed log-probabilities of answers under the model and under the reference.

    DPO       -log sigmoid(beta ((c - c_ref) - (r - r_ref)))                      c, r: of the chosen, the rejected
    DPO norm  the same of means over an answer's tokens
    KTO       w (1 - sigmoid(+-(beta (a - a_ref - z))))                           + desirable, - undesirable

In KTO, z is how far the model has moved from the reference overall, on the step's answers: the mean of a - a_ref
over prompts with answers to other prompts, at least 0, without a gradient (arXiv 2402.01306, section 4.1).

Shapes legend: P pairs, S samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_margins(
    chosen_P: Tensor, rejected_P: Tensor, reference_chosen_P: Tensor, reference_rejected_P: Tensor
) -> Tensor:
    """By how much more than the reference the model prefers the chosen answers: (P,)."""
    return (chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P)


def dpo_loss(margins_P: Tensor, beta: float) -> Tensor:
    """The loss of each pair: (P,)."""
    return -F.logsigmoid(beta * margins_P)


def kto_loss(
    moved_S: Tensor,
    desirable_S: Tensor,
    baseline: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """The loss of each sample: (S,). `moved_S` is log-probability over the reference's; `baseline` is z."""
    sign = torch.where(desirable_S, 1.0, -1.0)
    weight = torch.where(desirable_S, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (moved_S - baseline)))
