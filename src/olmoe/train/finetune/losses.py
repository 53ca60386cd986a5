"""Sums of log-probabilities of the trained tokens of a batch, by whatever head the model has.

Shapes legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import CausalLM
from olmoe.quant import PackedModule
from olmoe.train.finetune.masks import IGNORE


def head_weight(model: CausalLM) -> Tensor:
    """The output head's matrix (V, D), decoded if it is packed."""
    head = model.lm_head
    return head.decode("weight", torch.float32) if isinstance(head, PackedModule) else head.weight


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of hidden states (N, D), summed over the tokens that are trained; scalar fp32."""
    used = labels != IGNORE  # logits of others are not computed
    return ops.linear_cross_entropy(hidden[used], weight, labels[used], IGNORE)
