"""The OLMoE network as plain torch modules (`network`), its initial weights (`init`), and its router losses.

It knows neither transformers, nor caches, nor distribution, nor quantized formats.
"""

from __future__ import annotations

from olmoe.model.init import allocate, initialize, without_values
from olmoe.model.network import (
    ACTIVATIONS,
    Attend,
    Attention,
    CausalLM,
    Decoder,
    DecoderLayer,
    Experts,
    Linear,
    Output,
    RMSNorm,
    RotaryEmbedding,
    Router,
    RouterOutput,
    SparseMoeBlock,
    activation,
    causal_attend,
    network_type,
    set_backend,
    set_products,
)

__all__ = [
    "ACTIVATIONS",
    "Attend",
    "Attention",
    "CausalLM",
    "Decoder",
    "DecoderLayer",
    "Experts",
    "Linear",
    "Output",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "RouterOutput",
    "SparseMoeBlock",
    "activation",
    "allocate",
    "causal_attend",
    "initialize",
    "network_type",
    "set_backend",
    "set_products",
    "without_values",
]
