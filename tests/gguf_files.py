"""Small GGUF files for tests: of a model that a tokenizer fits, and one whose header is as short as it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmoe.config import ModelConfig
from olmoe.model import CausalLM
from olmoe.weights import export
from olmoe.weights.gguf import metadata as keys
from olmoe.weights.gguf.block_types import BY_NAME
from olmoe.weights.gguf.encode import encode
from olmoe.weights.gguf.names import tensor_shapes
from olmoe.weights.gguf.writer import PlannedTensor, write

TOKENS = ["<|end|>", "a", "b", "c", "ab", "abc", "  ", "[PAD7]"]
TYPES = np.array([3, 1, 1, 1, 1, 1, 4, 5], np.int32)
MERGES = ["a b", "ab c"]


def tiny_config(**changes: Any) -> ModelConfig:
    """One layer, two experts, eight tokens."""
    values: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return ModelConfig(**(values | changes))


def tiny_metadata(config: ModelConfig) -> dict[str, Any]:
    """All that a reader needs, with a tokenizer of `TOKENS`."""
    return {
        "general.architecture": "olmoe",
        **keys.to_metadata(config),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "olmo",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.add_bos_token": False,
    }


def write_tiny(
    path: Path,
    config: ModelConfig | None = None,
    *,
    kind: str = "Q4_0",
    metadata: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...] | None] | None = None,
) -> Path:
    """A file of random weights; `metadata` and `shapes` change or (None) leave out what it would hold."""
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(0)
    entries = {k: v for k, v in (tiny_metadata(config) | (metadata or {})).items() if v is not None}
    wanted = {k: v for k, v in (tensor_shapes(config) | (shapes or {})).items() if v is not None}
    planned, data = [], []
    for name, shape in wanted.items():
        plain = len(shape) == 1 or "ffn_gate_inp" in name or shape[-1] % BY_NAME[kind].block_values
        tensor = PlannedTensor(name, shape, BY_NAME["F32" if plain else kind])
        planned.append(tensor)
        data.append(encode(name, torch.randn(shape, generator=generator) * 0.1, tensor.kind))
    write(path, entries, planned, data)
    return path


def save_folder(model: CausalLM, folder: Path, tokenizer_file: Path, **options: Any) -> Path:
    """A checkpoint folder with its tokenizer."""
    texts = {"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")}
    export.save(model, folder, extra_files=texts, **options)
    return folder
