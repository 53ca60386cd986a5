"""The optimizer and the learning-rate schedule of OLMoE."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from olmoe.runtime import no_grad
from olmoe.train.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters: norms, embeddings and routers decay too, as in OLMoE."""
    return torch.optim.AdamW(
        groups(model.parameters()),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters as optimizers take them.

    Those of one mesh form a group, because fused updates take no others together; plain ones have none.
    """
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": each} for each in found.values()]


def learning_rate(config: ScheduleConfig, peak: float, tokens: int) -> float:
    """The rate after `tokens` training tokens.

    Linear from 0.1 x peak to the peak over `warmup_tokens`; then, counted from there, half a cosine (OLMo's
    `cosine_with_warmup`) or a straight line, down to `final_fraction` x peak at `total_tokens`.
    """
    if tokens < config.warmup_tokens:
        return peak * (0.1 + 0.9 * tokens / config.warmup_tokens)
    low = peak * config.final_fraction
    if tokens >= config.total_tokens:
        return low
    progress = (tokens - config.warmup_tokens) / (config.total_tokens - config.warmup_tokens)
    if config.kind == "linear":
        return peak + (low - peak) * progress
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


@no_grad
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients down to the norm `max_norm` if theirs is larger; return the one they had."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    scale_down(gradients, norm, max_norm)
    return norm


def scale_down(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients of that norm in place by min(1, max_norm / (norm + 1e-6)), OLMo's rule."""
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
