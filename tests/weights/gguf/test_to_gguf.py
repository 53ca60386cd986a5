"""Checkpoint folders to GGUF: types, values, streaming, and what is refused. llama.cpp's part is in its own file."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from conftest import make_model
from gguf_files import save_folder
from olmoe.errors import CheckpointError, ConfigError, TokenizerError, UserError
from olmoe.quant.formats import Q4_0
from olmoe.weights import checkpoint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.gguf.to_gguf import FILE_TYPES, to_gguf
from olmoe.weights.names import parameter_shapes
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import Recipe
from sentences import refused

WIDE = {"hidden_size": 64, "intermediate_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    return save_folder(make_model(**WIDE), tmp_path_factory.mktemp("model") / "my-model", tokenizer_file)


def all_parameters(config):
    for parameter, shape in parameter_shapes(config).items():
        for expert in range(shape[0]) if len(shape) == 3 else [None]:
            yield parameter, expert


@pytest.mark.parametrize("name", FILE_TYPES)
def test_types_of_tensors(folder, tmp_path, name):
    to_gguf(folder, tmp_path / "x.gguf", name)
    source = GGUFSource(tmp_path / "x.gguf")
    for tensor in source.file.tensors.values():
        plain = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.kind.name == ("F32" if plain else name.upper())
    assert source.file.metadata["general.file_type"] == FILE_TYPES[name]
    expected = {"f32": "ALL_F32"}.get(name, f"MOSTLY_{name.upper()}")
    assert gguf.LlamaFileType(FILE_TYPES[name]).name == expected


def test_full_precision_is_kept(folder, tmp_path):
    to_gguf(folder, tmp_path / "x.gguf", "f32")
    source, original = GGUFSource(tmp_path / "x.gguf"), open_source(folder)
    for parameter, expert in all_parameters(source.config):
        assert torch.equal(source.read(parameter, expert), original.read(parameter, expert))


def test_bf16_is_the_default_and_exact_for_bf16_checkpoints(tmp_path, tokenizer_file):
    folder = save_folder(make_model(**WIDE), tmp_path / "model", tokenizer_file, dtype=torch.bfloat16)
    to_gguf(folder, tmp_path / "x.gguf")
    source, original = GGUFSource(tmp_path / "x.gguf"), open_source(folder)
    assert source.file.metadata["general.file_type"] == FILE_TYPES["bf16"]
    for parameter, expert in all_parameters(source.config):
        assert torch.equal(source.read(parameter, expert).float(), original.read(parameter, expert).float())


def test_sharded_and_tied_checkpoints(tmp_path, tokenizer_file):
    model = make_model(tie_word_embeddings=True, **WIDE)
    folder = save_folder(model, tmp_path / "model", tokenizer_file, max_shard_bytes=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    to_gguf(folder, tmp_path / "x.gguf", "f32")
    source = GGUFSource(tmp_path / "x.gguf")
    assert not source.config.tie_word_embeddings  # llama.cpp needs the head, so it is there
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(source.read(name), model.model.embed_tokens.weight)
    assert torch.equal(source.read("model.layers.1.mlp.experts.down_proj"), model.model.layers[1].mlp.experts.down_proj)


def test_rows_that_are_no_whole_blocks_stay_bf16(tmp_path, tokenizer_file):
    folder = save_folder(make_model(), tmp_path / "model", tokenizer_file)  # experts are 12 wide
    to_gguf(folder, tmp_path / "x.gguf", "q4_0")
    kinds = {name: tensor.kind.name for name, tensor in GGUFSource(tmp_path / "x.gguf").file.tensors.items()}
    assert kinds["blk.0.ffn_down_exps.weight"] == "BF16"
    assert kinds["blk.0.ffn_up_exps.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_0"


@pytest.fixture(scope="module")
def packed_folder(folder, tmp_path_factory):
    """Three formats; scales as a search may choose them."""

    def quantize(self, blocks):
        scales = (blocks.abs().amax(1) / 7.3).half()
        return self.round(blocks, scales), scales

    target = tmp_path_factory.mktemp("packed") / "packed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Q4_0, "quantize", quantize)
        recipe = Recipe(name="mixed", weight_format="q4_0", overrides={"model.embed_tokens": "q8_0", "lm_head": "q5_0"})
        pack(open_source(folder), target, recipe)
    return target


def test_packed_folders_keep_every_value(packed_folder, tmp_path):
    to_gguf(packed_folder, tmp_path / "x.gguf")
    source, original = GGUFSource(tmp_path / "x.gguf"), open_source(packed_folder)
    for parameter, expert in all_parameters(source.config):
        assert torch.equal(source.read(parameter, expert), original.read(parameter, expert).float()), parameter
    assert source.stored_as("model.embed_tokens.weight") == ("Q8_0",)
    assert source.stored_as("lm_head.weight") == ("Q5_0",)
    assert source.stored_as("model.layers.0.mlp.experts.gate_up_proj") == ("Q4_0", "Q4_0")
    assert source.file.metadata["general.file_type"] == FILE_TYPES["q4_0"]


def test_packed_folders_can_be_given_another_type(packed_folder, tmp_path):
    to_gguf(packed_folder, tmp_path / "x.gguf", "f32")
    source, original = GGUFSource(tmp_path / "x.gguf"), open_source(packed_folder)
    assert torch.equal(source.read("lm_head.weight"), original.read("lm_head.weight"))


def test_metadata_say_what_the_model_is(folder, tmp_path, tokenizer_file):
    to_gguf(folder, tmp_path / "x.gguf")
    metadata = GGUFSource(tmp_path / "x.gguf").file.metadata
    assert metadata["general.architecture"] == "olmoe"
    assert metadata["general.name"] == "my-model"
    assert metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert len(metadata["tokenizer.ggml.tokens"]) == 320
    assert "tokenizer.chat_template" not in metadata


def test_the_chat_template_comes_along(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    to_gguf(tmp_path / "model", tmp_path / "x.gguf")
    assert GGUFSource(tmp_path / "x.gguf").file.metadata["tokenizer.chat_template"] == "{{ messages }}"


def test_progress_counts_to_the_end(folder, tmp_path):
    calls = []
    to_gguf(folder, tmp_path / "x.gguf", "q8_0", lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(tensor.num_bytes for tensor in GGUFSource(tmp_path / "x.gguf").file.tensors.values())
    )


def test_at_most_one_tensor_is_in_memory(tmp_path, tokenizer_file):
    """Of 17 MB of experts, 0.4 MB each, none but the current one."""
    model = make_model(hidden_size=256, intermediate_size=128, num_experts=16, num_hidden_layers=3)
    folder = save_folder(model, tmp_path / "model", tokenizer_file)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    del model
    tracemalloc.start()  # of numpy and Python; torch's own is bounded by the same loop
    to_gguf(folder, tmp_path / "x.gguf", "q8_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 15_000_000
    assert peak < 3_000_000


def change(folder, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "kind", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), ConfigError, "There is no file"),
        (lambda f: change(f, "config.json", clip_qkv=8.0), ConfigError, "GGUF cannot express clip_qkv = 8.0"),
        (lambda f: change(f, "config.json", norm_topk_prob=True), ConfigError, "GGUF cannot express norm_topk_prob"),
        (lambda f: change(f, "config.json", hidden_act="gelu"), ConfigError, "GGUF cannot express hidden_act = 'gelu'"),
        (lambda f: (f / "tokenizer.json").unlink(), TokenizerError, "a checkpoint folder needs a tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), TokenizerError, "is not a tokenizer file"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "holds neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), CheckpointError, "is truncated or not"),
    ],
)
def test_broken_folders_are_refused_and_leave_nothing(folder, tmp_path, damage, kind, sentence):
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")
    assert sentence in refused(lambda: to_gguf(tmp_path / "model", tmp_path / "x.gguf"), kind)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, tokenizer_file):
    model = make_model()
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = 1e30
    folder = save_folder(model, tmp_path / "model", tokenizer_file)
    message = refused(lambda: to_gguf(folder, tmp_path / "x.gguf", "f16"), CheckpointError)
    assert "blk.1.ffn_down_exps.weight" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    to_gguf(folder, tmp_path / "x.gguf", "bf16")


def test_an_unwritable_path_is_refused(folder, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(lambda: to_gguf(folder, tmp_path / "file" / "x.gguf"), UserError)


def test_rows_of_every_expert_are_in_place(folder, tmp_path):
    """Gate and up are two halves of one parameter here and two tensors there."""
    to_gguf(folder, tmp_path / "x.gguf", "f32")
    file, original = GGUFSource(tmp_path / "x.gguf").file, checkpoint.load(folder)
    for e in range(8):
        gate, up = original.model.layers[0].mlp.experts.gate_up_proj[e].chunk(2)
        np.testing.assert_array_equal(file.rows("blk.0.ffn_gate_exps.weight", e).view(np.float32), gate)
        np.testing.assert_array_equal(file.rows("blk.0.ffn_up_exps.weight", e).view(np.float32), up)
