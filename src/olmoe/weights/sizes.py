"""How many bytes a model takes in every format of this package, from its architecture alone. No torch.

The numbers are file sizes without headers; `tests/weights/test_sizes.py` compares them with what is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from olmoe.config import ModelConfig

# Bytes per block of 32 weights; rows come in groups of 16 (`olmoe.quant.formats.blocks`).
_BLOCK_BYTES = {"q8_0": 34, "q5_0": 22, "q4_0": 18}
_BLOCK, _GROUP = 32, 16
# Recipes of `olmoe.weights.recipes` -> the formats of experts, of attention, and of embeddings and head.
PACKED = {
    "int8": ("q8_0", "q8_0", "q8_0"),
    "int4": ("q4_0", "q4_0", "q5_0"),
    "int4-high": ("q4_0", "q8_0", "q8_0"),
    "q4_0": ("q4_0", "q4_0", "q4_0"),
}


@dataclass(frozen=True)
class Size:
    """Bytes of the weights in one format, and of the keys and values of one token."""

    weights: int
    cache_per_token: int


def sizes(config: ModelConfig) -> dict[str, Size]:
    """The size of a model in every format, by the format's name."""
    values = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim  # keys and values of a token
    total = config.num_parameters
    plain = {"float32": Size(4 * total, 4 * values), "bfloat16": Size(2 * total, 2 * values)}
    return plain | {name: Size(packed_bytes(config, name), 2 * values) for name in PACKED}


def packed_bytes(config: ModelConfig, recipe: str) -> int:
    """Bytes of a model's tensors as `recipe` packs it, with bf16 for what stays plain."""
    experts, attention, ends = PACKED[recipe]
    d, kv, f = config.hidden_size, config.kv_heads * config.head_dim, config.intermediate_size
    counts = config.parameter_counts()
    biases = config.num_hidden_layers * (2 * d + 2 * kv) if config.attention_bias else 0
    per_expert = _matrix(2 * f, d, experts) + _matrix(d, f, experts)
    per_layer = 2 * _matrix(d, d, attention) + 2 * _matrix(kv, d, attention) + config.num_experts * per_expert
    return (
        config.num_hidden_layers * per_layer
        + (1 if config.tie_word_embeddings else 2) * _matrix(config.vocab_size, d, ends)
        + 2 * (counts["norms"] + counts["routers"] + biases)
    )


def _matrix(rows: int, columns: int, format: str) -> int:
    """Bytes of one matrix; one whose columns are not whole blocks stays plain."""
    if columns % _BLOCK:
        return 2 * rows * columns
    return -(-rows // _GROUP) * _GROUP * (columns // _BLOCK) * _BLOCK_BYTES[format]
