"""The table of tensors says what the network with packed modules has, without building it."""

from __future__ import annotations

import math
import time

import pytest
import torch

from configurations import small_config
from olmoe.quant import PackedLayout, PackedModule, SavedLayout
from olmoe.weights import packed_file
from olmoe.weights.names import parameter_shapes
from olmoe.weights.recipes import RECIPES
from olmoe.weights.table import TensorTable
from packed_folders import WHOLE

MIXED = PackedLayout("q4_0", {"*.gate": "q8_0", "*.gate_up_proj": "bf16", "model.layers.1.self_attn.q_proj": "q5_0"})
SAVED = SavedLayout(
    "nf4",
    True,
    None,
    frozenset({"model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.down_proj"}),
)
LAYOUTS = {name: recipe.layout() for name, recipe in RECIPES.items()} | {"mixed": MIXED, "saved": SAVED}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        WHOLE,
        {},
        WHOLE | {"tie_word_embeddings": True, "vocab_size": 77},
        WHOLE | {"attention_bias": True, "num_key_value_heads": 1},
        {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 3},
    ],
    ids=str,
)
def test_it_lists_what_the_modules_store_in_their_order(layout, changes):
    config = small_config(**changes)
    table, model = TensorTable(config, layout), packed_file.build(config, layout)
    modules = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        stored = isinstance(module, PackedModule) and any(
            leaf == matrix or leaf.startswith(f"{matrix}_") for matrix in module.shapes
        )
        modules[name] = (tuple(parameter.shape), parameter.dtype if stored else None)
    assert [(name, *part[1:]) for name, part in table.parts().items()] == [(n, *p) for n, p in modules.items()]
    assert {name: row.weights for name, row in table.items()} == {
        name: math.prod(shape) for name, shape in parameter_shapes(config).items()
    }
    assert sum(row.weights for row in table.values()) == config.num_parameters
    for name, row in table.items():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        format = module.formats.get(leaf) if isinstance(module, PackedModule) else None
        assert (row.format and row.format.name) == (format and format.name)
        assert row.experts == (config.num_experts if ".experts." in name else None)


def test_nothing_is_allocated_or_built():
    start = time.perf_counter()
    table = TensorTable(small_config(vocab_size=2**30, hidden_size=2**12), PackedLayout("q4_0"))
    assert table["lm_head.weight"].weights == 2**42
    assert table.parts()["lm_head.weight"][1:] == ((2**26, 2**7 * 16 * 18), torch.uint8)
    assert time.perf_counter() - start < 5


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        TensorTable(small_config(), PackedLayout("q4_0"))["model.layers.9.mlp.gate.weight"]
