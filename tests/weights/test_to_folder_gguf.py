"""GGUF files to checkpoint folders: values, shards, files, and what is refused."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from conftest import make_model
from gguf_files import save_folder, write_tiny
from olmoe.errors import CheckpointError, TokenizerError, UserError
from olmoe.io.tensor_file import TensorWriter
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint, export, hf_folder
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.gguf.to_gguf import to_gguf
from olmoe.weights.names import parameter_shapes
from olmoe.weights.to_folder import to_folder
from sentences import refused


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_holds_the_values_of_the_file(tmp_path, kind, dtype):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", kind=kind))
    to_folder(source, tmp_path / "out", dtype)
    model = checkpoint.load(tmp_path / "out")
    assert model.config == source.config
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, source.read(name).to(dtype)), name


def test_there_and_back_is_the_same_checkpoint(tmp_path, tokenizer_file):
    model = make_model()
    folder = save_folder(model, tmp_path / "in", tokenizer_file, dtype=torch.bfloat16)
    to_gguf(folder, tmp_path / "x.gguf")
    to_folder(GGUFSource(tmp_path / "x.gguf"), tmp_path / "out")
    first, second = checkpoint.load(folder), checkpoint.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert hf_folder.read_headers(folder).keys() == hf_folder.read_headers(tmp_path / "out").keys()
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((f / name).read_text()) for f in (folder, tmp_path / "out"))
        assert before | {"initializer_range": 0.02} == after | {"initializer_range": 0.02}
    texts = ["Once upon a time  there was<|endoftext|> a dog.\n", "naïve 日本"]
    before, after = (Tokenizer.from_folder(f).encode_batch(texts) for f in (folder, tmp_path / "out"))
    assert before == after


def test_tied_files_stay_tied(tmp_path):
    from gguf_files import tiny_config

    source = GGUFSource(write_tiny(tmp_path / "x.gguf", tiny_config(tie_word_embeddings=True)))
    to_folder(source, tmp_path / "out")
    model = checkpoint.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_are_cut_like_those_of_a_saved_model(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf"))
    to_folder(source, tmp_path / "out", max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 2 * source.config.num_parameters
    export.save(checkpoint.load(tmp_path / "out"), tmp_path / "saved", max_shard_bytes=10_000)
    assert json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())["weight_map"].keys() == (
        index["weight_map"].keys()
    )


def test_progress_counts_to_the_end(tmp_path):
    calls = []
    source = GGUFSource(write_tiny(tmp_path / "x.gguf"))
    to_folder(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (2 * source.config.num_parameters,) * 2
    assert len(calls) == len(parameter_shapes(source.config)) - 2 + 2 * 3  # stacks are read expert by expert


def test_values_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    path = write_tiny(tmp_path / "x.gguf", kind="F32")
    source = GGUFSource(path)
    start = source.file.tensors["blk.0.attn_v.weight"].start
    data = bytearray(path.read_bytes())
    data[start : start + 4] = b"\x00\x00\xc0\x7f"  # not a number
    path.write_bytes(data)
    message = refused(lambda: to_folder(GGUFSource(path), tmp_path / "out"), CheckpointError)
    assert "'model.layers.0.self_attn.v_proj.weight' has values that are not finite" in message
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_foreign_tokenizer_is_refused_before_anything_is_written(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", metadata={"tokenizer.ggml.model": "llama"}))
    refused(lambda: to_folder(source, tmp_path / "out"), TokenizerError)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_stops_the_writing_leaves_nothing(tmp_path, monkeypatch, error):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf"))
    written = []
    original = TensorWriter.write

    def write(self, name, piece, offset=0):
        written.append(name)
        if len(written) == 5:
            raise error
        original(self, name, piece, offset)

    monkeypatch.setattr(TensorWriter, "write", write)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        to_folder(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
