"""Our routed experts behind transformers' experts interface, for other people's mixture-of-experts models.

`model.set_experts_implementation("olmoe")` (after `olmoe.hf.register()`) computes the experts of transformers'
OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE and every other class of the same layout with `olmoe.ops`.

Shapes legend: N tokens, D hidden, E experts of this module, K experts per token, F expert width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from olmoe import ops
from olmoe.errors import BackendUnavailableError
from olmoe.ops.activation import SILU, plain_activation

NAME = "olmoe"

SILU.add(SiLUActivation)

# Attributes that transformers' decorator sets on an experts class -> the value we support, and what the other means.
LAYOUT: dict[str, tuple[bool, str]] = {
    "has_gate": (True, "no gate"),
    "has_bias": (False, "biases"),
    "has_post_expert_norm": (False, "a norm after each expert"),
    "is_transposed": (False, "transposed weights"),
    "is_concatenated": (True, "interleaved gate and up rows"),
}


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of `module` on hidden_states (N, D) with ids and weights (N, K) -> (N, D).

    Under expert parallelism `module` holds E of the experts, and id E stands for those held elsewhere: they
    contribute nothing. Raises `BackendUnavailableError` for an experts class of another layout.
    """
    check_layout(module)
    weights = (module.gate_up_proj, module.down_proj)
    x = hidden_states.to(weights[0].dtype)  # as in transformers: autocast may widen only one of the two
    activation = plain_activation(module.act_fn)
    if not getattr(module, "_is_expert_parallel", False):
        return ops.moe(x, top_k_weights, top_k_index, *weights, activation).to(hidden_states.dtype)
    return ops.moe_part(x, top_k_weights, top_k_index, *weights, activation, 0).to(hidden_states.dtype)


def check_layout(module: Any) -> None:
    """Refuse experts that are not act(gate x) * (up x) with stacked weights (E, 2F, D) and (E, D, F)."""
    reason = None
    for flag, (ours, other) in LAYOUT.items():
        if getattr(module, flag, ours) != ours:
            reason = f"has {other}"
    if getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate:
        reason = "gates in its own way"
    if not all(hasattr(module, name) for name in ("gate_up_proj", "down_proj", "act_fn")):
        reason = "has no stacked gate_up_proj and down_proj"
    if reason is not None:
        raise BackendUnavailableError(
            f"experts_implementation='olmoe' cannot compute {type(module).__name__}, which {reason}; "
            "choose 'grouped_mm', 'batched_mm' or 'eager'."
        )
