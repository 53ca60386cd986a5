"""The optimizer and the learning-rate schedule of OLMoE."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from olmoe.train.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters in one group: norms, embeddings and routers decay too, as in OLMoE."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


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


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)) and return their norm (OLMo's rule)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
