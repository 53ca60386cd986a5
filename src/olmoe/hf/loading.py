"""`load_state_dict` of files as they lie on disk, where every expert's projections are tensors of their own.

`from_pretrained` stacks experts while it loads. transformers' `Trainer` resumes through `load_state_dict`
instead, finds no stacked experts in its own checkpoint, warns, and goes on with the weights it has.

Shapes legend: E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmoe.model import Experts
from olmoe.weights.names import DOWN, GATE_UP, expert_names


def accept_single_experts(experts: Experts) -> None:
    """Let `experts` load from `experts.<e>.{gate,up,down}_proj.weight` as well."""
    experts.register_load_state_dict_pre_hook(_stack)


def _stack(module: Experts, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Replace single tensors of all experts by the two stacks; an incomplete set stays, and is reported as such."""
    count = module.gate_up_proj.shape[0]
    names = [expert_names(prefix, e) for e in range(count)]
    if not all(name in state_dict for expert in names for name in expert):
        return
    gates, ups, downs = ([state_dict.pop(expert[i]) for expert in names] for i in range(3))
    state_dict[f"{prefix}{GATE_UP}"] = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    state_dict[f"{prefix}{DOWN}"] = torch.stack(downs)
