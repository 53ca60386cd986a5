"""Names of tensors, to parts of parameters and back."""

from __future__ import annotations

import pytest
import torch

from olmoe.config import ModelConfig
from olmoe.weights.names import Part, count_layers, expert_part, parameter_shapes, parts_of

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_experts=3,
    num_experts_per_tok=2, eos_token_id=0,
)  # fmt: skip


def test_parts_fill_every_parameter_exactly_once():
    for parameter, shape in parameter_shapes(CONFIG).items():
        seen = torch.zeros(shape, dtype=torch.int)
        for part in parts_of(parameter, shape):
            assert seen[part.index].shape == part.shape
            seen[part.index] += 1
        assert bool((seen == 1).all()), parameter


def test_names_of_experts_are_read_as_they_are_written():
    stacks = {name: shape for name, shape in parameter_shapes(CONFIG).items() if ".mlp.experts." in name}
    parts = [part for name, shape in stacks.items() for part in parts_of(name, shape)]
    assert len(parts) == 2 * 3 * 3  # layers, experts, matrices
    assert [expert_part(part.name, CONFIG) for part in parts] == parts
    up = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert expert_part(up, CONFIG) == Part(up, (8, 16), "model.layers.1.mlp.experts.gate_up_proj", 2, 8)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.up_proj.weight",  # of three
        "model.layers.0.mlp.experts.01.up_proj.weight",  # a second spelling
        "model.layers.0.mlp.experts.1.up_proj.weight\n",
        "model.layers.0.mlp.experts.1.gate_up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.gate.weight",
    ],
)
def test_other_names_are_no_experts(name):
    assert expert_part(name, CONFIG) is None


def test_layers_are_counted_by_names():
    assert count_layers(parameter_shapes(CONFIG)) == 2
    assert count_layers(["model.layers.7.x", "model.layers.07.x", "model.norm.weight", "x.model.layers.1.y"]) == 1
