"""Matrices one at a time from every layout of a folder, equal to the loaded model's."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from olmoe.errors import CheckpointError
from olmoe.io.tensor_file import TensorWriter
from olmoe.weights import checkpoint, export
from olmoe.weights import source as source_module
from olmoe.weights.checkpoint import open_source
from olmoe.weights.source import BlockSource, load_model
from packed_folders import WHOLE, decoded, packed_folder, plain_folder


def fused_folder(folder):
    """A checkpoint with stacked experts, as transformers 5 has them in memory."""
    model = make_model()
    folder.mkdir()
    values = dict(model.named_parameters())
    shapes = {name: (tuple(v.shape), v.dtype) for name, v in values.items()}
    with TensorWriter(folder / "model.safetensors", shapes, {"format": "pt"}) as writer:
        for name, value in values.items():
            writer.write(name, value)
    (folder / "config.json").write_text(model.config.to_json("float32"))
    return folder


def check(source, model):
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            for e in range(source.config.num_experts):
                assert torch.equal(source.read(name, e).float(), parameter[e].float()), (name, e)
        else:
            assert torch.equal(source.read(name).float(), parameter.float()), name


def test_single_experts_in_shards_and_stacked_experts(tmp_path):
    export.save(make_model(), tmp_path / "shards", dtype=torch.bfloat16, max_shard_bytes=40_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in (tmp_path / "shards", fused_folder(tmp_path / "fused")):
        source = open_source(folder)
        check(source, checkpoint.load(folder))
        check(source, load_model(source, torch.float32))
    assert open_source(tmp_path / "shards").read("model.norm.weight").dtype == torch.bfloat16


def test_whole_stacks_and_tied_embeddings(tmp_path):
    source = open_source(fused_folder(tmp_path / "fused"))
    assert source.read("model.layers.0.mlp.experts.down_proj").shape == (8, 32, 12)
    tied = open_source(plain_folder(tmp_path / "tied", tie_word_embeddings=True))
    model = load_model(tied, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check(tied, model)


def test_packed_folders_are_decoded(tmp_path):
    folder = packed_folder(tmp_path / "m", "int8", intermediate_size=12)  # down_proj stays plain
    source = open_source(folder)
    check(source, decoded(checkpoint.load(folder)))
    assert source.read("lm_head.weight").dtype == torch.float32


def test_files_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "RELEASE_BYTES", 10_000)
    folder = plain_folder(tmp_path / "m", **WHOLE)
    source = open_source(folder)
    kept = source.read("lm_head.weight")  # 20 kB
    assert not source._handles
    (folder / "model.safetensors").write_bytes(b"")  # a mapped tensor would be gone
    assert torch.isfinite(kept.float()).all()


def test_texts_travel(tmp_path, tokenizer_file):
    source = open_source(plain_folder(tmp_path / "m", tokenizer_file))
    assert set(source.files()) == {"tokenizer.json", "generation_config.json"}
    assert source.files()["tokenizer.json"] == tokenizer_file.read_text(encoding="utf-8")
    assert not isinstance(source, BlockSource)


def test_broken_folders_are_refused_when_they_are_opened(tmp_path):
    folder = plain_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        open_source(folder)
