"""Configurations to metadata and back, and what either side refuses."""

from __future__ import annotations

import numpy as np
import pytest

from configurations import CASES, small_config
from olmoe.config import ModelConfig, RopeParameters
from olmoe.errors import CheckpointError, ConfigError
from olmoe.weights.gguf.metadata import to_config, to_metadata
from sentences import refused

REFUSED = ("clip_qkv", "norm_topk_prob", "attention_bias", "gelu", "gqa", "mqa", "dynamic_rope", "dynamic_rope_short")
# What no key of GGUF tells, so that a file gives the defaults.
TRAINING = {"initializer_range": 0.02}


def restored(config: ModelConfig, **changes) -> ModelConfig:
    metadata = {"general.architecture": "olmoe", **to_metadata(config), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    # As a file stores them: floats in single precision.
    stored = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in kept.items()}
    return to_config(stored, config.vocab_size, tied=config.tie_word_embeddings)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in REFUSED], ids=lambda c: c.name)
def test_configurations_come_back(case):
    config = small_config(**case.changes)
    assert restored(config) == small_config(**(case.changes | TRAINING))


def test_the_released_configuration_comes_back():
    assert restored(ModelConfig()) == ModelConfig()


@pytest.mark.parametrize("case", [c for c in CASES if c.name in REFUSED], ids=lambda c: c.name)
def test_what_llama_cpp_would_compute_otherwise_is_not_written(case):
    message = refused(lambda: to_metadata(small_config(**case.changes)), ConfigError)
    assert message.startswith("GGUF cannot express ")


@pytest.mark.parametrize("ends", [None, 5, (5,), (5, 6), (5, 6, 7)])
def test_up_to_three_ends_of_text(ends):
    config = small_config(eos_token_id=ends)
    assert restored(config).eos_token_ids == config.eos_token_ids
    assert ("tokenizer.ggml.bos_token_id" in to_metadata(config)) == (ends is not None)


def test_more_ends_of_text_are_refused():
    assert "eos_token_id lists 4" in refused(lambda: to_metadata(small_config(eos_token_id=(1, 2, 3, 4))), ConfigError)


def test_the_same_end_under_two_keys_counts_once():
    config = restored(small_config(eos_token_id=7), **{"tokenizer.ggml.eot_token_id": 7})
    assert config.eos_token_id == 7


def test_keys_of_the_published_files():
    """What llama.cpp's converter writes for the released checkpoints (facts of the format, olmoe-facts 6.4)."""
    metadata = {
        "general.architecture": "olmoe",
        "general.name": "OLMoE 1B 7B 0924",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "quantize.imatrix.chunks_count": 10,
        "olmoe.block_count": 16,
        "olmoe.context_length": 4096,
        "olmoe.embedding_length": 2048,
        "olmoe.feed_forward_length": 1024,
        "olmoe.attention.head_count": 16,
        "olmoe.attention.head_count_kv": 16,
        "olmoe.rope.freq_base": 10000.0,
        "olmoe.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "olmoe.expert_count": 64,
        "olmoe.expert_used_count": 8,
        "olmoe.vocab_size": 50304,
        "tokenizer.ggml.eos_token_id": 50279,
        "tokenizer.ggml.padding_token_id": 1,
    }
    assert to_config(metadata, 50304, tied=False) == ModelConfig()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"general.architecture": "llama"}, "of architecture 'llama'; only 'olmoe'"),
        ({"general.architecture": None}, "of architecture None"),
        ({"general.architecture": np.arange(9)}, "of architecture [0, 1, 2"),
        ({"split.count": 3}, "one of 3 parts; merge them"),
        ({"olmoe.block_count": None}, "lacks the metadata key olmoe.block_count"),
        ({"olmoe.block_count": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"olmoe.block_count": "two"}, "num_hidden_layers must be a positive integer, not 'two'"),
        ({"olmoe.attention.head_count": np.array([4, 2])}, "num_attention_heads must be a positive integer, not ["),
        ({"olmoe.attention.head_count": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"olmoe.expert_used_count": 9}, "num_experts_per_tok 9 exceeds num_experts 8"),
        ({"olmoe.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps must be a number"),
        ({"olmoe.rope.freq_base": -1.0}, "rope_theta must be a positive number"),
        ({"olmoe.rope.scaling.type": "yarn"}, "scales RoPE by the method 'yarn'"),
        ({"olmoe.rope.scaling.type": "linear", "olmoe.rope.scaling.factor": 0.5}, "must be a number of at least 1"),
        ({"olmoe.rope.dimension_count": 4}, "olmoe.rope.dimension_count = 4, but this network allows only 8"),
        ({"olmoe.attention.key_length": 16}, "olmoe.attention.key_length = 16"),
        ({"olmoe.expert_weights_norm": True}, "olmoe.expert_weights_norm = True"),
        ({"olmoe.expert_gating_func": 2}, "olmoe.expert_gating_func = 2"),
        ({"olmoe.attention.clamp_kqv": 8.0}, "olmoe.attention.clamp_kqv = 8.0"),
        ({"olmoe.vocab_size": 319}, "olmoe.vocab_size = 319, but this network allows only 320"),
        ({"olmoe.new_trick": 1}, "the key 'olmoe.new_trick' = 1, which is unknown here"),
        ({"olmoe.a\nb": 1}, r"the key 'olmoe.a\nb' = 1"),
        ({"tokenizer.ggml.eos_token_id": -1}, "eos_token_id must be null, a token id or a list of them"),
        ({"tokenizer.ggml.padding_token_id": "x"}, "pad_token_id must be null or a token id, not 'x'"),
    ],
)  # fmt: skip
def test_contradictory_metadata_are_one_sentence(changes, sentence):
    message = refused(lambda: restored(small_config(), **changes))
    assert sentence in message


def test_the_older_name_of_the_linear_factor():
    config = restored(small_config(), **{"olmoe.rope.scale_linear": 4.0})
    assert config.rope == RopeParameters(rope_type="linear", factor=4.0)


def test_neutral_keys_change_nothing():
    changes = {"olmoe.expert_weights_scale": 1.0, "olmoe.expert_gating_func": 1, "olmoe.rope.scaling.type": "none"}
    assert restored(small_config(), **changes) == restored(small_config())


def test_errors_name_the_side_at_fault():
    with pytest.raises(CheckpointError):
        to_config({}, 320, tied=False)


@pytest.mark.parametrize("key", ["eos", "eot", "eom", "padding", "bos", "unknown"])
def test_an_id_of_all_ones_is_no_token(key):
    """What llama.cpp stores for a token that there is not: -1 as an unsigned number."""
    config = restored(small_config(), **{f"tokenizer.ggml.{key}_token_id": 2**32 - 1})
    without = restored(small_config(), **{f"tokenizer.ggml.{key}_token_id": None})
    assert config == without


def test_numbers_that_are_the_same_in_every_layer():
    config = small_config()
    changes = {
        "olmoe.attention.head_count": np.array([config.num_attention_heads] * 2, np.uint32),
        "olmoe.attention.head_count_kv": np.array([config.kv_heads] * 2, np.int32),
        "olmoe.feed_forward_length": np.array([config.intermediate_size] * 2, np.uint32),
        "olmoe.attention.sliding_window_pattern": np.array([False, False]),
        "olmoe.rope.freq_base": np.array([config.rope.rope_theta] * 2, np.float32),
        "olmoe.expert_used_count": np.array([config.num_experts_per_tok] * 2, np.uint32),
    }
    assert restored(config, **changes) == restored(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", [4, 2]),
        ("attention.head_count", [4, 4, 4]),  # of two layers
        ("feed_forward_length", [12, 24]),
        ("attention.sliding_window_pattern", [True, False]),
        ("attention.sliding_window", [0, 64]),
    ],
)
def test_numbers_that_differ_between_layers_are_refused(key, value):
    message = refused(lambda: restored(small_config(), **{f"olmoe.{key}": np.array(value)}))
    assert str(value) in message


@pytest.mark.parametrize("value", [0, 0.0, False, "", np.array([0, 0]), np.array([], np.int32)])
def test_unknown_keys_that_say_nothing_are_read_over(value):
    assert restored(small_config(), **{"olmoe.new_trick": value}) == restored(small_config())
