"""Sizes by format are those of the tensors that packing writes."""

from __future__ import annotations

import math

import pytest
import torch

from configurations import small_config
from olmoe.config import ModelConfig
from olmoe.model import CausalLM
from olmoe.weights import packed_file, sizes
from olmoe.weights.recipes import RECIPES
from olmoe.weights.table import TensorTable
from packed_folders import WHOLE


def test_the_recipes_are_those_of_packing():
    assert set(sizes.PACKED) == set(RECIPES)
    for name, (experts, attention, ends) in sizes.PACKED.items():
        layout = RECIPES[name].layout()
        assert layout.name_of("model.layers.3.mlp.experts.gate_up_proj") == experts
        assert layout.name_of("model.layers.3.mlp.experts.down_proj") == experts
        assert layout.name_of("model.layers.3.self_attn.v_proj.weight") == attention
        assert layout.name_of("model.embed_tokens.weight") == layout.name_of("lm_head.weight") == ends


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(WHOLE, id="all packed"),
        pytest.param({}, id="down_proj plain"),
        pytest.param(WHOLE | {"tie_word_embeddings": True, "vocab_size": 77}, id="tied, rows that fill no group"),
        pytest.param(WHOLE | {"attention_bias": True, "num_key_value_heads": 1}, id="biases, one KV head"),
        pytest.param({"hidden_size": 40, "intermediate_size": 64}, id="only down_proj packed"),
    ],
)
def test_bytes_are_those_of_the_tensors(recipe, changes):
    config = small_config(**changes)
    tensors = packed_file.file_tensors(TensorTable(config, RECIPES[recipe].layout()), torch.bfloat16)
    written = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    assert sizes.packed_bytes(config, recipe) == written


def test_plain_sizes_and_the_cache():
    config = small_config(num_key_value_heads=2)
    found = sizes.sizes(config)
    count = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    assert (found["float32"].weights, found["bfloat16"].weights) == (4 * count, 2 * count)
    assert found["bfloat16"].cache_per_token == found["int4"].cache_per_token == 2 * 2 * 2 * 2 * 8
    assert found["float32"].cache_per_token == 2 * found["int8"].cache_per_token


def test_the_released_model():
    found = sizes.sizes(ModelConfig())
    assert {name: round(size.weights / 1e9, 2) for name, size in found.items()} == {
        "float32": 27.68, "bfloat16": 13.84, "int8": 7.35, "int4": 3.92, "int4-high": 4.13, "q4_0": 3.9,
    }  # fmt: skip
    assert sizes.sizes(ModelConfig(num_hidden_layers=2**30))["int4"].weights > 10**15  # counted, not built
