"""Edited checkpoints: ours in all runners, transformers' own, against the original and against loops for clarity."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import olmoe
from configurations import VOCAB_SIZE
from conftest import make_model
from edited_models import IDS, LOAD, edited_folder, every_edit, run
from olmoe.errors import CheckpointError
from olmoe.model import CausalLM, causal_attend
from olmoe.ops import cpu
from olmoe.runner import RouterPolicy
from olmoe.weights import checkpoint, export, hf_folder
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.edited import EditedSource, write
from olmoe.weights.hf_folder import HFFolder
from packed_folders import plain_folder

BACKENDS = ["torch", "reference", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="kernels"))]
KINDS = ("pruned", "merged", "reordered", "duplicated", "top_k", "normalized", "together")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    """An fp32 checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("edited") / "model"
    export.save(make_model(), path, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
    return path


@pytest.fixture(scope="module")
def start(folder) -> Blueprint:
    return Blueprint.unchanged(open_source(folder).config)


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol * float(b.abs().max()))


def by_hand(model: CausalLM, blueprint: Blueprint) -> CausalLM:
    """The edited model, made of modules in memory, expert by expert."""
    made = CausalLM(blueprint.config).eval()
    made.model.embed_tokens, made.model.norm, made.lm_head = model.model.embed_tokens, model.model.norm, model.lm_head
    with torch.no_grad():
        for layer, plan in zip(made.model.layers, blueprint.layers, strict=True):
            old = copy.deepcopy(model.model.layers[plan.origin])
            layer.input_layernorm, layer.post_attention_layernorm = old.input_layernorm, old.post_attention_layernorm
            layer.self_attn.load_state_dict(old.self_attn.state_dict())
            for e, mix in enumerate(plan.experts):
                for new, was in (
                    (layer.mlp.gate.weight, old.mlp.gate.weight),
                    (layer.mlp.experts.gate_up_proj, old.mlp.experts.gate_up_proj),
                    (layer.mlp.experts.down_proj, old.mlp.experts.down_proj),
                ):
                    new[e] = sum(w * was[i] for i, w in zip(mix.experts, mix.weights, strict=True))
    return made


@torch.inference_mode()
def logits(model, ids=IDS):
    positions = torch.arange(len(ids)).unsqueeze(0)
    return model.logits(model(torch.tensor([ids]), positions, causal_attend).hidden)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_edit_is_what_its_blueprint_says(folder, start, kind, tmp_path):
    blueprint = every_edit(start)[kind]
    out = edited_folder(folder, tmp_path / "out", blueprint)
    expected, found = by_hand(checkpoint.load(folder), blueprint), checkpoint.load(out)
    assert found.config == blueprint.config
    for (name, value), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, msg=name)
    # What was not averaged is as it was, bit for bit.
    if kind not in ("merged", "together"):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_ours_and_transformers_own_compute_the_same(folder, start, kind, tmp_path):
    out = edited_folder(folder, tmp_path / "out", every_edit(start)[kind])
    theirs = transformers.OlmoeForCausalLM.from_pretrained(out).eval()
    ours = olmoe.OlmoeForCausalLM.from_pretrained(out).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
        close(ours(torch.tensor([IDS])).logits[0], expected)
    for backend in ("torch", "reference", *(["cpu"] if cpu.available() else [])):
        close(run(out, backend)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pruned_model_is_the_original_with_those_experts_banned(folder, start, backend, tmp_path):
    pruned = every_edit(start)["pruned"]
    banned = np.ones((2, 8), dtype=bool)
    for layer, plan in enumerate(pruned.layers):
        banned[layer, [mix.experts[0] for mix in plan.experts]] = False
    expected, trace = run(folder, backend, RouterPolicy(banned=banned).resolve(start.config))
    found, routed = run(edited_folder(folder, tmp_path / "out", pruned), backend)
    close(found, expected)
    for layer, plan in enumerate(pruned.layers):
        kept = torch.tensor([mix.experts[0] for mix in plan.experts])
        assert torch.equal(kept[routed.expert_ids[:, layer].long()], trace.expert_ids[:, layer].long())


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_order_changes_nothing_but_numbers(folder, start, backend, tmp_path):
    moved = every_edit(start)["reordered"]
    expected, trace = run(folder, backend)
    found, routed = run(edited_folder(folder, tmp_path / "out", moved), backend)
    close(found, expected)
    torch.testing.assert_close(routed.weights, trace.weights)
    for layer, plan in enumerate(moved.layers):
        were = torch.tensor([mix.experts[0] for mix in plan.experts])
        assert torch.equal(were[routed.expert_ids[:, layer].long()], trace.expert_ids[:, layer].long())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_other_k_is_the_policy_of_that_k(folder, start, backend, normalize, tmp_path):
    blueprint = start.with_routing(5, normalize)
    policy = RouterPolicy(top_k=5, renormalize=normalize).resolve(start.config)
    found, _ = run(edited_folder(folder, tmp_path / "out", blueprint), backend)
    close(found, run(folder, backend, policy)[0])


def test_experts_that_are_never_chosen(tmp_path):
    """Their rows are in the softmax of all experts, so that it is the chosen weights' sum that says what happens."""
    model = make_model(norm_topk_prob=True)
    export.save(model, tmp_path / "normalized")
    start = Blueprint.unchanged(model.config)
    expected, trace = run(tmp_path / "normalized", "torch")
    never = [sorted(set(range(8)) - set(trace.expert_ids[:2, layer].flatten().tolist())) for layer in range(2)]
    count = min(map(len, never))
    assert count >= 2  # two tokens choose at most six of eight
    pruned = start.without([each[:count] for each in never])
    # Divided by their sum, the weights of the chosen do not know of the others: nothing changes at all.
    found, _ = run(edited_folder(tmp_path / "normalized", tmp_path / "a", pruned), "torch", ids=IDS[:2])
    close(found, expected[:2])
    # As OLMoE uses them, they grow by what the others had of the probability, 1 / (1 - that).
    model.config = dataclasses.replace(model.config, norm_topk_prob=False)
    export.save(model, tmp_path / "plain")
    plain = dataclasses.replace(pruned, original=model.config, normalize_top_k=False)
    routed = run(edited_folder(tmp_path / "plain", tmp_path / "b", plain), "torch", ids=IDS[:2])[1]
    with torch.inference_mode():
        positions = torch.arange(2).unsqueeze(0)
        router = checkpoint.load(tmp_path / "plain")(torch.tensor([IDS[:2]]), positions, causal_attend).routers[0]
    others = router.logits.softmax(-1)[:, never[0][:count]].sum(-1, keepdim=True)
    torch.testing.assert_close(routed.weights[:, 0], router.weights / (1 - others))


def test_experts_without_probability_are_pruned_for_nothing(tmp_path):
    model = make_model()
    with torch.no_grad():
        # One hidden number that is large in all tokens, and rows of the router that are far below zero for it.
        model.model.embed_tokens.weight[:, 0] = 5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
            layer.mlp.gate.weight[[2, 5]] = 0
            layer.mlp.gate.weight[[2, 5], 0] = -100
    export.save(model, tmp_path / "model")
    expected, trace = run(tmp_path / "model", "torch")
    out = edited_folder(tmp_path / "model", tmp_path / "out", Blueprint.unchanged(model.config).without([[2, 5]] * 2))
    close(run(out, "torch")[0], expected)
    assert not {2, 5} & set(trace.expert_ids.flatten().tolist())


def test_dtypes_are_kept_tensor_by_tensor(tmp_path):
    folder = plain_folder(tmp_path / "model")
    values = load_file(folder / "model.safetensors")
    for name in values:
        if "mlp.gate." in name or "norm" in name:
            values[name] = values[name].float() * 1.0001
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    start = Blueprint.unchanged(open_source(folder).config)
    out = edited_folder(folder, tmp_path / "out", start.reordered([[7, 6, 5, 4, 3, 2, 1, 0]] * 2))
    headers = {name: tensor.dtype for name, tensor in hf_folder.read_headers(out).items()}
    assert headers == {name: tensor.dtype for name, tensor in hf_folder.read_headers(folder).items()}
    written = load_file(out / "model.safetensors")
    assert torch.equal(written["model.layers.0.mlp.gate.weight"], values["model.layers.0.mlp.gate.weight"].flip(0))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_merged_expert_is_rounded_once(tmp_path):
    folder = plain_folder(tmp_path / "model")
    source = open_source(folder)
    blueprint = Blueprint.unchanged(source.config).merged([[[0, 3, 5]], [[0, 1, 2]]], LOAD)
    edited = EditedSource(source, blueprint)
    name, weights = "model.layers.0.mlp.experts.down_proj", blueprint.layers[0].experts[0].weights
    exact = sum(w * source.read(name, e).double() for e, w in zip((0, 3, 5), weights, strict=True))
    assert edited.read(name, 0).dtype == torch.bfloat16
    torch.testing.assert_close(edited.read(name, 0).double(), exact, rtol=2**-8, atol=0)
    row = edited.read("model.layers.0.mlp.gate.weight")
    rows = source.read("model.layers.0.mlp.gate.weight").double()
    exact = sum(w * rows[e] for e, w in zip((0, 3, 5), weights, strict=True))
    assert row.shape == (6, 32)
    torch.testing.assert_close(row[0].double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"num_key_value_heads": 2}], ids=str
)
def test_other_architectures(changes, tmp_path):
    model = make_model(**changes)
    export.save(model, tmp_path / "model")
    blueprint = every_edit(Blueprint.unchanged(model.config))["together"]
    out = edited_folder(tmp_path / "model", tmp_path / "out", blueprint)
    close(logits(checkpoint.load(out)), logits(by_hand(model, blueprint)))


def test_fused_experts_and_shards(folder, start, tmp_path):
    model = checkpoint.load(folder)
    export.save(model, tmp_path / "fused")
    save_file({n: v.contiguous() for n, v in model.named_parameters()}, tmp_path / "fused/model.safetensors")
    export.save(model, tmp_path / "shards", max_shard_bytes=50_000)
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    blueprint = every_edit(start)["together"]
    expected = checkpoint.load(edited_folder(folder, tmp_path / "out", blueprint))
    for name in ("fused", "shards"):
        found = checkpoint.load(edited_folder(tmp_path / name, tmp_path / f"out-{name}", blueprint))
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_files_travel(folder, start, tmp_path):
    out = tmp_path / "out"
    write(EditedSource(open_source(folder), every_edit(start)["pruned"], {"edits": {"prune": 2}}), out)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == VOCAB_SIZE - 1
    written = json.loads((out / "olmoe_edit.json").read_text())
    assert written["edits"] == {"prune": 2}
    assert Blueprint.from_dict(written, start.config) == every_edit(start)["pruned"]
    # It goes where the weights go, and an edit of an edited model has its own.
    again = Blueprint.unchanged(open_source(out).config).without([[0], [0]])
    edited_folder(out, tmp_path / "again", again)
    assert Blueprint.from_dict(json.loads((tmp_path / "again/olmoe_edit.json").read_text()), again.original) == again


def test_existing_folders(folder, start, tmp_path):
    blueprint = every_edit(start)["pruned"]
    out = edited_folder(folder, tmp_path / "out", blueprint)
    with pytest.raises(ValueError, match="exists already"):
        edited_folder(folder, out, blueprint)
    edited_folder(folder, out, start, overwrite=True)
    assert checkpoint.load(out).config == start.config
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not replaced even with --overwrite"):
        edited_folder(folder, out, blueprint, overwrite=True)
    with pytest.raises(ValueError, match="SRC and DST are both"):
        edited_folder(folder, folder, blueprint, overwrite=True)


def test_nothing_is_left_of_an_edit_that_fails(folder, start, tmp_path, monkeypatch):
    read = HFFolder.read

    def failing(self, parameter, expert=None):
        value = read(self, parameter, expert)
        return value * torch.nan if parameter == "model.norm.weight" else value

    monkeypatch.setattr(HFFolder, "read", failing)
    with pytest.raises(CheckpointError, match="not finite"):
        edited_folder(folder, tmp_path / "out", every_edit(start)["merged"])
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_is_read_at_a_time(folder, start, monkeypatch):
    """The largest read is a matrix: a stack of experts is never asked for whole."""
    read, sizes = HFFolder.read, []

    def counted(self, parameter, expert=None):
        value = read(self, parameter, expert)
        sizes.append((value.numel(), parameter))
        return value

    monkeypatch.setattr(HFFolder, "read", counted)
    source = EditedSource(open_source(folder), every_edit(start)["together"])
    for name in ("model.layers.2.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        for e in range(6):
            source.read(name, e)
    assert max(sizes)[0] == 2 * 12 * 32
