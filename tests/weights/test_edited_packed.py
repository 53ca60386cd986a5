"""Editing packed checkpoints: blocks are copied bit for bit, formats go along, merged experts are encoded anew."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import olmoe
from edited_models import LOAD, edited_folder, every_edit, run
from olmoe.ops import cpu
from olmoe.quant import PackedLayout, make_block_format
from olmoe.weights import checkpoint
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import Checkpoint, open_source
from olmoe.weights.edited import EditedSource, edited_recipe
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES, Recipe
from packed_folders import WHOLE, packed_folder, plain_folder

EXACT = ("pruned", "reordered", "duplicated", "top_k", "normalized")


def files(folder):
    """Weights, byte by byte, and config.json."""
    return (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("recipe", ["int4", "int4-high", "int8", "q4_0"])
@pytest.mark.parametrize("kind", EXACT)
def test_the_same_as_packing_after_the_edit(recipe, kind, tmp_path, tokenizer_file):
    """Codes of a matrix depend on nothing else where there is no calibration text."""
    packed = packed_folder(tmp_path / "packed", recipe, tokenizer_file, **WHOLE)
    blueprint = every_edit(Blueprint.unchanged(open_source(packed).config))[kind]
    plain = edited_folder(tmp_path / "packed-plain", tmp_path / "edited-plain", blueprint)
    pack(open_source(plain), tmp_path / "after", RECIPES[recipe])
    assert files(edited_folder(packed, tmp_path / "before", blueprint)) == files(tmp_path / "after")


@pytest.mark.skipif(not cpu.available(), reason="kernels")
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_packed_models_run_on_the_kernels(recipe, tmp_path):
    packed = packed_folder(tmp_path / "packed", recipe, **WHOLE)
    start = Blueprint.unchanged(open_source(packed).config)
    expected, trace = run(packed)
    moved = every_edit(start)["reordered"]
    found, routed = run(edited_folder(packed, tmp_path / "moved", moved))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for layer, plan in enumerate(moved.layers):
        were = torch.tensor([mix.experts[0] for mix in plan.experts])
        assert torch.equal(were[routed.expert_ids[:, layer].long()], trace.expert_ids[:, layer].long())
    for kind, blueprint in every_edit(start).items():
        out = edited_folder(packed, tmp_path / kind, blueprint)
        assert Checkpoint.open(out).format == recipe
        assert torch.isfinite(run(out)[0]).all()


def test_a_merged_expert_alone_is_encoded_anew(tmp_path):
    packed = packed_folder(tmp_path / "packed", "q4_0", **WHOLE)
    source = open_source(packed)
    blueprint = Blueprint.unchanged(source.config).merged([[[0, 3]], [[1, 2]]], LOAD)
    before, after = (
        load_file(path / "model.safetensors") for path in (packed, edited_folder(packed, tmp_path / "out", blueprint))
    )
    name, weights = "model.layers.0.mlp.experts.down_proj", blueprint.layers[0].experts[0].weights
    kept = [1, 2, 4, 5, 6, 7]
    assert torch.equal(after[name][1:], before[name][kept])
    average = sum(w * source.read(name, e) for e, w in zip((0, 3), weights, strict=True))
    assert torch.equal(after[name][0], make_block_format("q4_0").encode(average)["codes"])
    # Its row of the router is plain, and averaged as any.
    gate = "model.layers.0.mlp.gate.weight"
    average = sum(w * before[gate][e].float() for e, w in zip((0, 3), weights, strict=True))
    assert torch.equal(after[gate][0], average.to(before[gate].dtype))
    assert torch.equal(after[gate][1:], before[gate][kept])


def test_formats_go_with_their_layers(tmp_path):
    recipe = Recipe(
        "mixed", "q4_0", {"model.layers.1.*": "q8_0", "model.layers.0.self_attn.q_proj": "bf16", "lm_head": "q5_0"}
    )
    plain = plain_folder(tmp_path / "plain", **WHOLE)
    pack(open_source(plain), tmp_path / "packed", recipe)
    start = Blueprint.unchanged(open_source(plain).config)
    blueprint = start.with_layers([1, 0, 1])
    out = edited_folder(tmp_path / "packed", tmp_path / "out", blueprint)
    table = open_source(out).table
    formats = {name: row.format.name if row.format else None for name, row in table.items() if len(row.shape) > 1}
    for layer, wanted in enumerate(("q8_0", "q4_0", "q8_0")):
        assert formats[f"model.layers.{layer}.mlp.experts.down_proj"] == wanted
        assert formats[f"model.layers.{layer}.self_attn.k_proj.weight"] == wanted
    assert formats["model.layers.1.self_attn.q_proj.weight"] is None
    assert formats["model.layers.0.self_attn.q_proj.weight"] == "q8_0"
    assert formats["lm_head.weight"] == "q5_0"
    assert not [
        name
        for name in json.loads((out / "config.json").read_text())["quantization_config"]["overrides"]
        if "mlp.gate" in name
    ]
    before, after = checkpoint.load(tmp_path / "packed"), checkpoint.load(out)
    for new, plan in enumerate(blueprint.layers):
        pairs = zip(after.model.layers[new].parameters(), before.model.layers[plan.origin].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_overrides_that_still_hold_stay_as_they_are(tmp_path):
    packed = packed_folder(tmp_path / "packed", "int4-high", **WHOLE)
    source = open_source(packed)
    edited = EditedSource(source, Blueprint.unchanged(source.config).with_copies([0, 1]))
    assert isinstance(source.layout, PackedLayout)
    recipe = edited_recipe(edited, source.layout)
    assert (recipe.overrides, recipe.name, recipe.searches) == (RECIPES["int4-high"].overrides, "int4-high", True)


def test_rows_that_are_no_whole_blocks_stay_plain(tmp_path):
    """Experts 12 wide: their down matrices are plain beside packed gates."""
    packed = packed_folder(tmp_path / "packed", "q4_0")
    blueprint = every_edit(Blueprint.unchanged(open_source(packed).config))["together"]
    out = edited_folder(packed, tmp_path / "out", blueprint)
    name = "model.layers.0.mlp.experts.down_proj"
    before, after = (load_file(path / "model.safetensors")[name] for path in (packed, out))
    assert after.dtype == before.dtype == torch.bfloat16
    mix = blueprint.layers[0].experts[0]
    assert torch.equal(after[0], before[mix.experts[0]]) or len(mix.experts) > 1


@pytest.mark.parametrize("double", [False, True])
def test_what_save_pretrained_packed_is_decoded(double, tmp_path):
    plain = plain_folder(tmp_path / "plain", **WHOLE)
    wishes = olmoe.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = olmoe.OlmoeForCausalLM.from_pretrained(plain, quantization_config=wishes, dtype=torch.float32)
    model.save_pretrained(tmp_path / "nf4")
    source = open_source(tmp_path / "nf4")
    blueprint = every_edit(Blueprint.unchanged(source.config))["together"]
    out = edited_folder(tmp_path / "nf4", tmp_path / "out", blueprint)
    assert Checkpoint.open(out).layout is None
    found = checkpoint.load(out)
    dtype = source.layout.compute_dtype or torch.bfloat16
    edited = EditedSource(source, blueprint)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for e in range(4):
        assert torch.equal(found.get_parameter(name)[e], edited.read(name, e).to(dtype))
