"""Calibration gives the inputs that matrices of the loaded model meet, one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from olmoe.errors import CheckpointError
from olmoe.model import causal_attend
from olmoe.quant import PackedLayout
from olmoe.weights import checkpoint
from olmoe.weights.calibrate import calibrate
from olmoe.weights.checkpoint import open_source
from olmoe.weights.table import TensorTable
from packed_folders import WHOLE, plain_folder

IDS_BT = torch.randint(0, 320, (3, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def seen_by_the_model(folder):
    """E[x x^T] of what attention, experts (all tokens) and head of the loaded model multiply with."""
    model, found = checkpoint.load(folder, dtype=torch.float32), {}

    def keep(name):
        def hook(module, inputs):
            x = inputs[0].flatten(0, -2)
            found[name] = x.T @ x / len(x)

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(keep(f"{name}.weight"))
        elif name.endswith("mlp.experts"):
            module.register_forward_pre_hook(keep(f"{name}.gate_up_proj"))
        elif name == "lm_head":
            module.register_forward_pre_hook(keep("lm_head.weight"))
    positions = torch.arange(IDS_BT.shape[1]).expand_as(IDS_BT)
    model.logits(model(IDS_BT, positions, causal_attend).hidden)
    return found


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_inputs_are_those_of_the_model(tmp_path, changes):
    folder = plain_folder(tmp_path / "m", **WHOLE, **changes)
    source, expected = open_source(folder), seen_by_the_model(folder)
    names = set()
    for name, expert, weight, inputs in calibrate(source, IDS_BT):
        names.add((name, expert))
        assert torch.equal(weight, source.read(name, expert))
        if name in expected and (name != "lm_head.weight" or not changes.get("tie_word_embeddings")):
            torch.testing.assert_close(inputs._covariance, expected[name], rtol=1e-4, atol=1e-6)
        elif name.endswith("down_proj") and inputs is not None:
            assert inputs._covariance.shape == (weight.shape[1],) * 2
        else:
            assert inputs is None
    table = TensorTable(source.config, PackedLayout("q8_0"))
    matrices = {
        name: row for name, row in table.items() if len(row.shape) == 2 and not name.endswith("mlp.gate.weight")
    }
    stacks = {name: [None] if row.experts is None else range(row.experts) for name, row in matrices.items()}
    assert names == {(name, expert) for name, experts in stacks.items() for expert in experts}


def test_an_expert_that_no_token_chose_has_no_statistics(tmp_path):
    source = open_source(plain_folder(tmp_path / "m", **WHOLE))
    chosen = {}
    for name, _, _, inputs in calibrate(source, IDS_BT[:1, :1]):
        if name.endswith("down_proj"):
            chosen.setdefault(name, []).append(inputs is not None)
    assert [sum(experts) for experts in chosen.values()] == [source.config.num_experts_per_tok] * 2


def test_weights_that_are_not_finite_stop_it(tmp_path, monkeypatch):
    source = open_source(plain_folder(tmp_path / "m", **WHOLE))
    read = source.read
    monkeypatch.setattr(source, "read", lambda name, expert=None: read(name, expert) / (0 if expert == 3 else 1))
    with pytest.raises(CheckpointError, match="not finite"):
        list(calibrate(source, IDS_BT))
