"""Activation checkpointing: what backward needs of a layer is computed again instead of kept.

It wraps the layer's `forward`, so that parameters keep their names. Routers return what they decided and do no counting
themselves, so that nothing is counted twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from olmoe.adapters.experts import outputs_unneeded
from olmoe.adapters.modules import LoraExperts
from olmoe.model import DecoderLayer

_aten = torch.ops.aten
# Products and attention: nearly all of a layer's time.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.olmoe.grouped_linear.default,
    torch.ops.olmoe.causal_attention.default,
}


def wrap(layer: DecoderLayer, mode: str) -> None:
    """Make a layer recompute in backward: all of it (`full`), or all but products and attention (`selective`)."""
    if mode == "off":
        return
    inner: Callable[..., Any] = layer.forward

    def forward(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if mode == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        elif isinstance(layer.mlp.experts, LoraExperts):
            options["context_fn"] = _until_experts
        return checkpoint(inner, *arguments, **options)

    layer.forward = forward  # type: ignore[method-assign, assignment]


def _until_experts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a layer in the forward pass, and again in backward, which ends before its experts' outputs."""
    return nullcontext(), outputs_unneeded()


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
