"""Dropout, in training only: on the embeddings and on what each block adds to the residual stream.

OLMoE itself trains without dropout, passing over its data once. Without it, a small corpus that is passed over many
times is memorised. The network itself has no dropout, so that the same network runs everywhere; hooks add it around
one forward pass (Srivastava et al., 2014; on embeddings and residual branches as in Vaswani et al., 2017).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from olmoe.model import CausalLM


@contextmanager
def residual_dropout(model: CausalLM, probability: float, seed: int) -> Iterator[None]:
    """Zero values of the embeddings and of each block's outputs with `probability`, and scale the others up.

    Masks depend on `seed`, the shapes and the kind of device, so a resumed run draws the same masks as an uninterrupted
    one. A branch that backward computes a second time draws the same mask again. With probability 0 nothing is hooked
    or drawn. 0 <= probability < 1.
    """
    if probability == 0:
        yield
        return
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    states: dict[nn.Module, Tensor] = {}

    def drop(x: Tensor) -> Tensor:
        kept = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
        return x * kept.div_(1 - probability)

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        if module in states:
            generator.set_state(states[module])
        else:
            states[module] = generator.get_state()
        return (drop(output[0]), *output[1:]) if isinstance(output, tuple) else drop(output)

    layers: list[Any] = list(model.model.layers)
    branches = [model.model.embed_tokens, *(block for layer in layers for block in (layer.self_attn, layer.mlp))]
    handles = [branch.register_forward_hook(hook) for branch in branches]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
