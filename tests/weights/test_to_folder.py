"""Checkpoint folders of every kind to folders for other software: values, files, and what vLLM leaves out."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from configurations import small_config
from conftest import make_model
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint, export, hf_folder
from olmoe.weights.checkpoint import open_source
from olmoe.weights.to_folder import ignored_by_vllm, to_folder
from packed_folders import WHOLE, decoded, packed_folder, plain_folder


@pytest.mark.parametrize("recipe", ["int4", "int4-high", "int8", "q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_folder_holds_what_it_decodes_to(tmp_path, recipe, tied):
    packed = packed_folder(tmp_path / "packed", recipe, **WHOLE, tie_word_embeddings=tied)
    to_folder(open_source(packed), tmp_path / "out", torch.float32)
    expected, found = decoded(checkpoint.load(packed)), checkpoint.load(tmp_path / "out")
    assert found.config == expected.config
    for (name, value), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_folder_is_rounded_once(tmp_path, dtype):
    export.save(model := make_model(), tmp_path / "plain")
    to_folder(open_source(tmp_path / "plain"), tmp_path / "out", dtype)
    for value, other in zip(checkpoint.load(tmp_path / "out").parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other.to(dtype))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_fused_experts_are_taken_apart(tmp_path):
    from safetensors.torch import save_file

    export.save(model := make_model(), folder := tmp_path / "fused")
    save_file({name: value.contiguous() for name, value in model.named_parameters()}, folder / "model.safetensors")
    to_folder(open_source(folder), tmp_path / "out", torch.float32)
    export.save(model, tmp_path / "saved")
    written, expected = (hf_folder.read_headers(tmp_path / name) for name in ("out", "saved"))
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    for value, other in zip(checkpoint.load(tmp_path / "out").parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other)


def test_files_travel_and_what_is_missing_is_derived(tmp_path, tokenizer_file):
    folder = plain_folder(tmp_path / "plain", tokenizer_file)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (folder / "notes.txt").write_text("not a model's")
    to_folder(open_source(folder), out := tmp_path / "out")
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "notes.txt").exists()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 128
    text = "Once upon a time  there was<|endoftext|> a dog.\n"
    assert Tokenizer.from_folder(out).encode(text) == Tokenizer.from_folder(folder).encode(text)


def test_a_generation_config_is_written_where_there_is_none(tmp_path):
    folder = plain_folder(tmp_path / "plain")
    (folder / "generation_config.json").unlink()
    to_folder(open_source(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 319


def test_each_expert_is_read_once(tmp_path, monkeypatch):
    source, read = open_source(plain_folder(tmp_path / "plain")), []
    original = source.read

    def counted(parameter, expert=None):
        read.append((parameter, expert))
        return original(parameter, expert)

    monkeypatch.setattr(source, "read", counted)
    to_folder(source, tmp_path / "out")
    assert len(read) == len(set(read))
    assert ("model.layers.1.mlp.experts.gate_up_proj", 7) in read


def test_no_folder_is_exported_onto_itself(tmp_path):
    from olmoe.errors import UserError

    folder = plain_folder(tmp_path / "plain")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError):
        to_folder(open_source(folder), folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({}, []),
        ({"hidden_act": "swish", "num_key_value_heads": 2, "tie_word_embeddings": True}, []),
        ({"clip_qkv": 0.5}, ["clip_qkv = 0.5"]),
        ({"norm_topk_prob": True, "attention_bias": True}, ["norm_topk_prob = True", "attention_bias = True"]),
        ({"hidden_act": "gelu", "rms_norm_eps": 1e-6}, ["hidden_act = 'gelu'", "rms_norm_eps = 1e-06"]),
    ],
)
def test_what_vllm_ignores_is_said(tmp_path, caplog, changes, ignored):
    assert ignored_by_vllm(small_config(**changes)) == ignored
    folder = plain_folder(tmp_path / "plain", **changes)
    with caplog.at_level(logging.WARNING, logger="olmoe"):
        to_folder(open_source(folder), tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "vLLM" in record.getMessage()]
    assert said == (
        [f"vLLM computes OLMoE without {', '.join(ignored)}, so its texts would differ from ours"] * bool(ignored)
    )
