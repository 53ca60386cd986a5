"""A GGUF file as a source of weights: values, files, and tensors that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from gguf_files import tiny_config, write_tiny
from olmoe.errors import CheckpointError, TokenizerError
from olmoe.tokenizer import Tokenizer
from olmoe.weights.gguf.reader import GGUFFile
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.names import parameter_shapes
from olmoe.weights.source import BlockSource
from sentences import refused

GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_every_parameter_has_its_shape_and_values(tmp_path, kind):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", kind=kind))
    assert source.config == tiny_config()
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    for parameter, shape in parameter_shapes(source.config).items():
        stacked = parameter in (GATE_UP, DOWN)
        value = source.read(parameter, 1) if stacked else source.read(parameter)
        assert value.shape == (shape[1:] if stacked else shape)
        plain = "norm" in parameter or "gate.weight" in parameter
        assert value.dtype == (torch.float32 if plain else dtypes.get(kind, torch.float32))
        assert value.is_contiguous()
        assert 0.05 < value.float().std() < 0.2
    gate, up = (
        quants.dequantize(np.array(source.file.rows(f"blk.0.ffn_{part}_exps.weight", 1)), GGMLQuantizationType[kind])
        for part in ("gate", "up")
    )
    np.testing.assert_array_equal(source.read(GATE_UP, 1).float().numpy(), np.concatenate((gate, up)))


def test_whole_stacks_can_be_read(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf"))
    for parameter in (GATE_UP, DOWN):
        assert torch.equal(source.read(parameter), torch.stack([source.read(parameter, e) for e in range(2)]))


def test_blocks_are_the_stored_bytes(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", kind="Q8_0"))
    assert source.stored_as(GATE_UP) == ("Q8_0", "Q8_0")
    assert isinstance(source, BlockSource)
    blocks = source.blocks(GATE_UP, 1)
    assert blocks.shape == (64, 34)
    np.testing.assert_array_equal(blocks[32:], source.file.rows("blk.0.ffn_up_exps.weight", 1))
    assert source.blocks("lm_head.weight").shape == (8, 34)


def test_a_file_without_a_head_ties_the_embeddings(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", tiny_config(tie_word_embeddings=True)))
    assert source.config.tie_word_embeddings
    assert "lm_head.weight" not in parameter_shapes(source.config)


def test_frequency_factors_of_one_are_nothing(tmp_path):
    path = write_tiny(tmp_path / "x.gguf", shapes={"rope_freqs.weight": (8,)})
    assert "'rope_freqs.weight', which OLMoE does not have" in refused(lambda: GGUFSource(path), CheckpointError)
    tensor = GGUFFile(path).tensors["rope_freqs.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.start : tensor.start + 32] = np.ones(8, "<f4").tobytes()
    assert GGUFSource(GGUFFile.from_bytes(bytes(data))).config == tiny_config()


def test_files_are_those_of_a_checkpoint_folder(tmp_path):
    metadata = {"tokenizer.chat_template": "{{ messages }}"}
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", tiny_config(pad_token_id=6), metadata=metadata))
    files = source.files()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path, eos_ids=source.config.eos_token_ids)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.encode("abc  ab<|end|>") == [5, 6, 4, 0]
    assert json.loads(files["generation_config.json"])["eos_token_id"] == 0
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|end|>"


def test_a_file_without_a_tokenizer_has_weights_only(tmp_path):
    missing = dict.fromkeys(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges"))
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", metadata=missing))
    assert set(source.files()) == {"generation_config.json"}


def test_another_tokenizer_is_refused_when_it_is_asked_for(tmp_path):
    source = GGUFSource(write_tiny(tmp_path / "x.gguf", metadata={"tokenizer.ggml.model": "llama"}))
    assert "tokenizer.ggml.model 'llama'" in refused(source.files, TokenizerError)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metadata": {"olmoe.block_count": 2}}, "say 2 layers, but the file holds tensors of 1"),
        ({"metadata": {"olmoe.block_count": 2**31 - 1}}, "say 2147483647 layers, but the file holds tensors of 1"),
        ({"metadata": {"olmoe.expert_count": 3}}, "has shape [2, 32], but its metadata make it [3, 32]"),
        ({"metadata": {"olmoe.feed_forward_length": 64}}, "shape [2, 32, 32], but its metadata make it [2, 64, 32]"),
        ({"metadata": {"olmoe.vocab_size": 9}}, "olmoe.vocab_size = 9, but this network allows only 8"),
        ({"shapes": {"output_norm.weight": None}}, "lacks the tensor output_norm.weight"),
        ({"shapes": {"token_embd.weight": None}}, "olmoe.vocab_size = 8, but this network allows only 1"),
        ({"shapes": {"blk.0.attn_q.weight": (32, 64)}}, "attn_q.weight has shape [32, 64]"),
        ({"shapes": {"blk.0.attn_q.weight": (32, 32, 1)}}, "attn_q.weight has shape [32, 32, 1]"),
        ({"shapes": {"blk.0.attn_q.bias": (32,)}}, "the tensor 'blk.0.attn_q.bias', which OLMoE does not have"),
        ({"shapes": {"x\ny": (32,)}}, r"the tensor 'x\ny', which OLMoE does not have"),
        ({"metadata": {"general.architecture": "qwen2moe"}}, "of architecture 'qwen2moe'"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_themselves_are_refused(tmp_path, changes, sentence):
    path = write_tiny(tmp_path / "x.gguf", **changes)
    assert sentence in refused(lambda: GGUFSource(path), CheckpointError)
