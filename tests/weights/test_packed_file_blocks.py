"""A packed folder as GGUF's blocks: the same values, whatever chose the scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import make_model
from gguf_files import save_folder
from olmoe.quant.formats import Q4_0
from olmoe.weights import quantize
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf.block_types import BY_NAME, dequantize
from olmoe.weights.gguf.encode import encode
from olmoe.weights.packed_file import PackedFile
from olmoe.weights.recipes import Recipe
from olmoe.weights.source import BlockSource

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"  # 12 columns: no whole blocks
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_file) -> PackedFile:
    """Mixed formats, with scales that the reference quantizer would not choose."""
    root = tmp_path_factory.mktemp("packed")
    save_folder(make_model(), root / "plain", tokenizer_file)
    recipe = Recipe(
        name="mixed",
        weight_format="q4_0",
        overrides={"model.layers.*.self_attn.q_proj": "q8_0", "*.k_proj": "bf16"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Q4_0, "quantize", quantize_with_smaller_scales)
        quantize.pack(open_source(root / "plain"), root / "packed", recipe)
    return PackedFile(root / "packed")


def quantize_with_smaller_scales(self, blocks):
    scales = (blocks.abs().amax(1) / 7.3).half()
    return self.round(blocks, scales), scales


def test_types_are_those_of_the_layout(source):
    names = {name: source.stored_as(name) for name in (GATE_UP, DOWN, QUERY, KEY, "model.norm.weight")}
    assert names == {
        GATE_UP: ("Q4_0",), DOWN: ("F32",), QUERY: ("Q8_0",), KEY: ("F32",), "model.norm.weight": ("F32",),
    }  # fmt: skip
    assert isinstance(source, BlockSource)


@pytest.mark.parametrize(("parameter", "expert"), [(GATE_UP, 0), (GATE_UP, 7), (QUERY, None), ("lm_head.weight", None)])
def test_blocks_have_the_values_that_the_folder_has(source, parameter, expert):
    kind = BY_NAME[source.stored_as(parameter)[0]]
    expected = source.read(parameter, expert)
    np.testing.assert_array_equal(dequantize(kind, source.blocks(parameter, expert)), expected.numpy())


def test_encoding_the_values_again_would_change_them(source):
    """Hence blocks are taken as they are."""
    values = source.read(GATE_UP, 0)
    again = dequantize(BY_NAME["Q4_0"], encode("w", values, BY_NAME["Q4_0"]))
    assert not torch.equal(torch.from_numpy(again), values)
