"""`load_state_dict` accepts a checkpoint in its layout on disk."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from configurations import small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeModel


def model(seed, kind=OlmoeForCausalLM):
    torch.manual_seed(seed)
    return kind(OlmoeConfig(**small_config().to_dict()))


@pytest.mark.parametrize("kind", [OlmoeForCausalLM, OlmoeModel])
def test_per_expert_weights_are_stacked(kind, tmp_path):
    saved, loaded = model(0, kind), copy.deepcopy(model(1, kind))
    saved.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0.gate_proj." in name for name in on_disk)
    count = len(on_disk)
    assert loaded.load_state_dict(on_disk) == ([], [])
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
    assert len(on_disk) == count  # the caller's dictionary is not modified


def test_stacked_weights_load_and_missing_experts_are_reported(tmp_path):
    saved, loaded = model(0), model(1)
    assert loaded.load_state_dict(saved.state_dict()) == ([], [])
    saved.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    del on_disk["model.layers.1.mlp.experts.3.up_proj.weight"]
    report = loaded.load_state_dict(on_disk, strict=False)
    assert report.missing_keys == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in report.unexpected_keys
