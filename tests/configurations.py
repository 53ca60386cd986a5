"""The configurations on which the network is compared with transformers, each with the reason it is there."""

from __future__ import annotations

from typing import Any, NamedTuple

from olmoe.config import ModelConfig, RopeParameters

VOCAB_SIZE = 320


class Case(NamedTuple):
    name: str
    reason: str
    changes: dict[str, Any]
    tokens: int = 24  # sequence length of the comparison


CASES = [
    Case("released", "OLMoE's own switches at small size", {}),
    Case("clip_qkv", "clipping after QK-norm must bite, so the limit is below the norm's output", {"clip_qkv": 0.5}),
    Case("norm_topk_prob", "renormalised routing weights", {"norm_topk_prob": True}),
    Case("gqa", "fewer KV heads: k_norm is narrower than q_norm", {"num_key_value_heads": 2}),
    Case("mqa", "one KV head, the limit of grouping", {"num_key_value_heads": 1}),
    Case("tied", "one matrix for input and output embeddings", {"tie_word_embeddings": True}),
    Case("attention_bias", "biases on all four projections", {"attention_bias": True}),
    Case("linear_rope", "positions divided by the factor", {"rope": RopeParameters(rope_type="linear", factor=2.0)}),
    Case(
        "dynamic_rope",
        "sequences beyond max_position_embeddings raise the base",
        {"rope": RopeParameters(rope_type="dynamic", factor=8.0), "max_position_embeddings": 16},
    ),
    Case(
        "dynamic_rope_short",
        "sequences within max_position_embeddings leave the base alone",
        {"rope": RopeParameters(rope_type="dynamic", factor=2.0), "max_position_embeddings": 64},
    ),
    Case("top_1", "K=1: one expert a token", {"num_experts_per_tok": 1}),
    Case("top_all", "K=E: every expert for every token", {"num_experts_per_tok": 8}),
    Case("one_token", "T=1: attention over a single key", {}, tokens=1),
    Case("odd_expert_width", "F=5: rows that grouped kernels cannot align", {"intermediate_size": 5}),
    Case("gelu", "another activation than SiLU", {"hidden_act": "gelu"}),
    Case("theta", "another RoPE base", {"rope": RopeParameters(rope_theta=500.0)}),
]


def small_config(**changes: Any) -> ModelConfig:
    """A configuration with OLMoE's structure that runs in milliseconds."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 128,
        "eos_token_id": VOCAB_SIZE - 1,
        # Wide enough that routers, norms and attention all matter to the result.
        "initializer_range": 0.2,
    }
    return ModelConfig(**(values | changes))
