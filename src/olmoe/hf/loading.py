"""`load_state_dict` for files as they are on disk, where every expert's projections are separate tensors.

`from_pretrained` stacks experts while it loads. transformers' `Trainer` resumes through `load_state_dict`
instead, finds no stacked experts in its own checkpoint, warns, and continues with the weights it has.

Shapes legend: E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmoe.model import Experts
from olmoe.weights.names import DOWN, GATE_UP, expert_names


def accept_single_experts(experts: Experts) -> None:
    """Let `experts` also load from `experts.<e>.{gate,up,down}_proj.weight`."""
    experts.register_load_state_dict_pre_hook(_stack)


def _stack(module: Experts, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Replace the separate tensors of all experts with the two stacks; an incomplete set is left, and reported."""
    count = module.gate_up_proj.shape[0]
    names = [expert_names(prefix, e) for e in range(count)]
    if not all(name in state_dict for expert in names for name in expert):
        return
    gates, ups, downs = ([state_dict.pop(expert[i]) for expert in names] for i in range(3))
    state_dict[f"{prefix}{GATE_UP}"] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    state_dict[f"{prefix}{DOWN}"] = torch.stack(downs)
