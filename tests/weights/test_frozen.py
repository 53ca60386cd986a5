"""Models whose weights stay: dtypes, values, views of packed files, and one matrix at a time while they are packed."""

from __future__ import annotations

import json
import math

import pytest
import torch

import olmoe
from conftest import make_model
from olmoe.cli.main import main
from olmoe.errors import CheckpointError, ConfigError
from olmoe.model import causal_attend, set_backend
from olmoe.quant import PackedModule
from olmoe.weights import checkpoint, export
from olmoe.weights.checkpoint import open_source
from olmoe.weights.frozen import load_frozen
from olmoe.weights.names import parameter_shapes
from olmoe.weights.quantize import quantize
from olmoe.weights.recipes import BASE_RECIPES
from packed_folders import WHOLE, packed_folder, plain_folder
from sentences import refused

IDS = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    set_backend(model, "torch")
    with torch.no_grad():
        return model.logits(model(IDS, torch.arange(16).expand(2, 16), causal_attend).hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_plain_weights_keep_their_dtype_and_compute_in_fp32(tmp_path, tied):
    folder = plain_folder(tmp_path / "m", tie_word_embeddings=tied, attention_bias=True)
    model = load_frozen(open_source(folder))
    for name, parameter in model.named_parameters():
        wide = parameter.dim() == 1 or name.endswith("mlp.gate.weight")
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert not parameter.requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    found = logits(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(checkpoint.load(folder, dtype=torch.float32)), rtol=1e-4, atol=1e-5)


def test_fp32_weights_stay_fp32(tmp_path):
    export.save(make_model(), tmp_path / "m")
    model = load_frozen(open_source(tmp_path / "m"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(checkpoint.load(tmp_path / "m")))


@pytest.mark.parametrize("recipe", BASE_RECIPES)
def test_packing_in_memory_is_packing_into_a_folder(tmp_path, recipe, capsys):
    plain, folder = plain_folder(tmp_path / "plain"), tmp_path / "m"
    assert main(["quantize", str(plain), str(folder), "--format", recipe, "--quiet"]) == 0
    assert "nf4" in capsys.readouterr().out
    model = load_frozen(open_source(folder))
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedModule)}
    attention = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    assert packed == attention | {f"model.layers.{i}.mlp.experts" for i in range(2)}
    torch.testing.assert_close(logits(model), logits(checkpoint.load(folder)), rtol=1e-4, atol=1e-5)
    if recipe == "nf4":
        torch.testing.assert_close(logits(model), logits(load_frozen(open_source(plain), "nf4")), rtol=0, atol=0)
    other = olmoe.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_backend(other, "torch")
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, logits(model), rtol=1e-4, atol=1e-5)
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert values["double_quant"] == (recipe == "nf4-double")


def test_bits_a_weight(tmp_path):
    plain = plain_folder(tmp_path / "plain", hidden_size=64, intermediate_size=64)
    for recipe, bits in (("nf4", 4.5), ("nf4-double", 4.13)):
        kinds = quantize(plain, tmp_path / recipe, recipe).kinds
        formats, weights, size = kinds["experts, gate and up"]
        assert formats == "nf4"
        # A whole stack's scales share nothing: the nested blocks of an expert this small are not full.
        assert bits <= 8 * size / weights < bits + 0.3
        assert kinds["embeddings"][0] == kinds["output head"][0] == "bfloat16"


def test_a_packed_folder_is_not_copied(tmp_path):
    """All but norms, routers and biases are views of the mapped file."""
    quantize(plain_folder(tmp_path / "plain"), tmp_path / "m", "nf4")
    source = open_source(tmp_path / "m")
    model = load_frozen(source)
    address = source.tensors.tensor("lm_head.weight").data_ptr()
    start = min(source.tensors.tensor(name).data_ptr() for name in source.tensors.entries)
    end = start + (tmp_path / "m/model.safetensors").stat().st_size
    assert model.lm_head.weight.data_ptr() == address
    for name, parameter in model.named_parameters():
        copied = parameter.dim() == 1 and parameter.dtype == torch.float32 and "absmax" not in name
        if not copied and not name.endswith("mlp.gate.weight"):
            assert start <= parameter.data_ptr() < end, name


def test_folders_of_other_formats_are_frozen_too(tmp_path):
    folder = packed_folder(tmp_path / "m", "int4", **WHOLE)
    torch.testing.assert_close(logits(load_frozen(open_source(folder))), logits(checkpoint.load(folder)))


def test_no_more_than_one_matrix_is_read_at_a_time(tmp_path):
    """What is read dies before the next is, but for what stays plain."""
    import weakref

    source = open_source(plain_folder(tmp_path / "m"))
    alive, most, original = weakref.WeakSet(), [0], source.read
    largest = max(math.prod(shape[-2:]) for shape in parameter_shapes(source.config).values() if len(shape) == 3)

    def read(name, expert=None):
        value = original(name, expert)
        if expert is not None:
            alive.add(value)
        most[0] = max(most[0], sum(each.numel() for each in alive))
        return value

    source.read = read
    load_frozen(source, "nf4")
    assert 0 < most[0] <= 2 * largest  # the one that is being read, and that before it


def test_what_is_refused(tmp_path):
    folder = plain_folder(tmp_path / "m")
    assert "'q3' is unknown" in refused(lambda: load_frozen(open_source(folder), "q3"), ConfigError)
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = math.inf
    export.save(model, tmp_path / "broken")
    message = refused(lambda: load_frozen(open_source(tmp_path / "broken"), "nf4"), CheckpointError)
    assert "layers.1.mlp.experts.down_proj" in message
