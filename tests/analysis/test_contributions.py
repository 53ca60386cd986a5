"""Contributions of experts against a loop over tokens that is written for clarity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import make_model
from edited_models import edited_folder, every_edit
from olmoe.analysis import contributions
from olmoe.analysis.contributions import measure_contributions, weight_similarity
from olmoe.model import causal_attend
from olmoe.weights import checkpoint, export
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import open_source
from packed_folders import WHOLE, decoded, packed_folder

IDS_BT = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def by_loops(model, sample=range(60)):
    """Load, REAP's criterion and the cosines of outputs, token by token and expert by expert."""
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, 1)))
    out = model(IDS_BT, torch.arange(20).expand(3, 20), causal_attend)
    routed = out.routers
    load, reap, alike = (np.zeros((layers, experts, *rest)) for rest in ((), (), (experts,)))
    for i, layer in enumerate(model.model.layers):
        mlp = layer.mlp.experts

        def output(token, e, mlp=mlp, i=i):
            gate, up = (mlp.gate_up_proj[e].float() @ inputs[i][token].float()).chunk(2)
            return mlp.down_proj[e].float() @ (mlp.act_fn(gate) * up)

        for e in range(experts):
            found = []
            for token in range(60):
                for rank in range(routed[i].expert_ids.shape[1]):
                    if routed[i].expert_ids[token, rank] == e:
                        found.append(float(routed[i].weights[token, rank] * output(token, e).norm()))
            load[i, e] = len(found) / 60
            reap[i, e] = sum(found) / len(found) if found else 0
        outputs = [torch.cat([output(token, e) for token in sample]) for e in range(experts)]
        for a in range(experts):
            for b in range(experts):
                alike[i, a, b] = torch.nn.functional.cosine_similarity(outputs[a], outputs[b], dim=0)
    return load, reap, alike


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_topk_prob": True}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}, {"clip_qkv": 0.5}],
    ids=str,
)
def test_numbers_are_those_of_loops(changes, tmp_path, monkeypatch):
    export.save(make_model(**changes), tmp_path / "model")
    monkeypatch.setattr(contributions, "BATCH_TOKENS", 40)  # two batches, the second not full
    steps = []
    found = measure_contributions(
        open_source(tmp_path / "model"), IDS_BT, similarity=True, progress=lambda *step: steps.append(step)
    )
    load, reap, alike = by_loops(checkpoint.load(tmp_path / "model"))
    assert found.tokens == 60
    np.testing.assert_allclose(found.load, load)
    np.testing.assert_allclose(found.reap, reap, rtol=1e-4)
    np.testing.assert_allclose(found.similarity, alike, atol=1e-4)
    assert steps == [(n, 16) for n in range(1, 17)]
    assert found.load.sum(axis=1) == pytest.approx(3)


def test_similarity_is_of_a_sample(tmp_path, monkeypatch):
    export.save(make_model(), tmp_path / "model")
    monkeypatch.setattr(contributions, "SAMPLED_TOKENS", 5)
    found = measure_contributions(open_source(tmp_path / "model"), IDS_BT, similarity=True)
    expected = by_loops(checkpoint.load(tmp_path / "model"), torch.linspace(0, 59, 5).long().tolist())[2]
    np.testing.assert_allclose(found.similarity, expected, atol=1e-4)
    assert measure_contributions(open_source(tmp_path / "model"), IDS_BT).similarity is None


def test_a_packed_model_is_decoded(tmp_path):
    packed = packed_folder(tmp_path / "packed", "q4_0", **WHOLE)
    load, reap, _ = by_loops(decoded(checkpoint.load(packed)))
    found = measure_contributions(open_source(packed), IDS_BT)
    np.testing.assert_allclose(found.load, load)
    np.testing.assert_allclose(found.reap, reap, rtol=1e-4)


def test_similarity_of_weights(tmp_path):
    model = make_model()
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack[3] = 2 * stack[1]
            stack[6] = 0
    experts.requires_grad_(False)
    export.save(model, tmp_path / "model")
    found = weight_similarity(open_source(tmp_path / "model"))
    vectors = [torch.cat([experts.gate_up_proj[e].flatten(), experts.down_proj[e].flatten()]) for e in range(8)]
    for a in range(8):
        for b in range(8):
            expected = float(torch.nn.functional.cosine_similarity(vectors[a], vectors[b], dim=0))
            assert found[0, a, b] == pytest.approx(expected, abs=1e-5)
    assert found[0, 1, 3] == pytest.approx(1)
    assert not found[0, 6].any()


def test_permuting_experts_permutes_their_numbers(tmp_path):
    export.save(make_model(), tmp_path / "model")
    moved = every_edit(Blueprint.unchanged(open_source(tmp_path / "model").config))["reordered"]
    out = edited_folder(tmp_path / "model", tmp_path / "out", moved)
    before, after = (
        measure_contributions(open_source(path), IDS_BT, similarity=True) for path in (tmp_path / "model", out)
    )
    for layer, plan in enumerate(moved.layers):
        order = [mix.experts[0] for mix in plan.experts]
        np.testing.assert_allclose(after.load[layer], before.load[layer][order])
        np.testing.assert_allclose(after.reap[layer], before.reap[layer][order], rtol=1e-4)
        np.testing.assert_allclose(after.similarity[layer], before.similarity[layer][np.ix_(order, order)], atol=1e-4)
