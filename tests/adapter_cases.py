"""Random adapters of small models, and what models compute with them."""

from __future__ import annotations

import torch
from torch import Tensor

from configurations import VOCAB_SIZE
from olmoe import adapters
from olmoe.adapters import Adapter
from olmoe.config import ModelConfig
from olmoe.model import CausalLM, causal_attend

CASES = {
    "all": ("attention", "experts", "router"),
    "experts": ("experts",),
    "attention": ("attention",),
}
IDS = torch.arange(2, 14).remainder(VOCAB_SIZE)[None]


def random_adapter(
    config: ModelConfig, targets: tuple[str, ...] = CASES["all"], rank: int = 3, alpha: float = 6.0
) -> Adapter:
    """An adapter that changes what a model computes."""
    adapter = adapters.new_adapter(config, rank, alpha, targets, seed=1)
    generator = torch.Generator().manual_seed(2)
    for _, b in adapter.factors.values():
        b.normal_(0, 0.3, generator=generator)
    return adapter


def logits(model: CausalLM) -> Tensor:
    """Scores of `IDS`."""
    return model.logits(model(IDS, torch.arange(IDS.shape[1])[None], causal_attend).hidden)
