"""Models of random weights."""

from __future__ import annotations

import pytest
import torch

from configurations import small_config
from olmoe.bench import random_models
from olmoe.bench.random_models import random_model, skeleton
from olmoe.bench.speed import Measured
from olmoe.config import ModelConfig
from olmoe.errors import UserError
from olmoe.quant import PackedModule
from olmoe.weights import checkpoint
from olmoe.weights.recipes import RECIPES
from packed_folders import WHOLE, packed_folder
from sentences import refused

FORMATS = (*RECIPES, "bf16", "fp32")


@pytest.mark.parametrize("format", FORMATS)
def test_random_models_compute_finite_logits(format):
    model = random_model(small_config(**WHOLE), format)
    measured = Measured(model)
    running = measured.sequences(2, 8)
    assert measured.prefill(running, 5) > 0
    assert running.lengths == [5, 5]
    assert measured.decode(running) > 0
    assert running.lengths == [6, 6]
    logits = measured.sequences(2, 4).prefill([[0], [0, 1]])
    assert torch.isfinite(logits).all()
    assert logits.std() > 0  # neither zeros nor one value
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_random_packed_models_have_the_tensors_of_packed_folders(tmp_path, recipe):
    stored = checkpoint.load(packed_folder(tmp_path / "packed", recipe, **WHOLE))
    model = random_model(stored.config, recipe)
    shapes = {name: (p.shape, p.dtype) for name, p in stored.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == shapes
    assert {type(m) for m in model.modules()} == {type(m) for m in stored.modules()}
    assert not any(p.requires_grad for p in model.parameters())


def test_scales_are_the_small_ones_and_codes_are_noise():
    model = random_model(small_config(**WHOLE), "int8")
    module = model.model.layers[1].mlp.experts
    assert isinstance(module, PackedModule)
    values = module.decode("down_proj", torch.float32, 3)
    assert values.abs().max() <= 128 * 2.0**-11
    assert values.unique().numel() > 100
    assert not torch.equal(values, module.decode("down_proj", torch.float32, 4))
    other = model.model.layers[0].mlp.experts.decode("down_proj", torch.float32, 3)
    assert not torch.equal(values, other)


def test_matrices_longer_than_the_noise_are_filled_to_the_end(monkeypatch):
    monkeypatch.setattr(random_models, "_NOISE", 997)
    for format in ("fp32", "int4"):
        model = random_model(small_config(**WHOLE), format)
        again = random_model(small_config(**WHOLE), format)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), name  # memory that was left alone would differ, sooner or later
            assert p.dim() == 1 or (p.view(-1)[-997:] != 0).any(), name


def test_tied_embeddings_stay_one_tensor():
    for format in ("int4", "bf16"):
        model = random_model(small_config(tie_word_embeddings=True, **WHOLE), format)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_overrides_change_the_format_of_what_they_name():
    config = small_config(**WHOLE)
    plain, changed = skeleton(config, "q4_0"), skeleton(config, "q4_0", {"lm_head": "q8_0"})
    assert changed.lm_head.weight.numel() > plain.lm_head.weight.numel()
    assert changed.model.embed_tokens.weight.numel() == plain.model.embed_tokens.weight.numel()


def test_unknown_formats_are_refused():
    message = refused(lambda: random_model(small_config(), "int3"), UserError)
    assert "int3" in message
    assert "int4" in message


def test_weights_that_do_not_fit_the_memory_are_refused_before_they_are_made():
    huge = ModelConfig(num_hidden_layers=2, intermediate_size=2**24)
    assert "GB" in refused(lambda: random_model(huge, "bf16"))
