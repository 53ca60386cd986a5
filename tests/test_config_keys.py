"""Which keys of foreign configurations are read over, and which are refused because they may change the network."""

from __future__ import annotations

import json

import pytest
from transformers import OlmoeConfig

from olmoe.config import ModelConfig, RopeParameters
from sentences import refused

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 16}


def read(**changes):
    return ModelConfig.from_dict({"model_type": "olmoe", "max_position_embeddings": 128} | HEADS | changes)


PLAIN = read()

HARMLESS = {
    "transformers 4.45": {
        "_name_or_path": "allenai/OLMoE-1B-7B-0924", "transformers_version": "4.45.0", "torch_dtype": "bfloat16",
        "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False,
        "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "tie_encoder_decoder": False,
        "is_decoder": True, "add_cross_attention": False, "cross_attention_hidden_size": None,
        "max_length": 20, "min_length": 0, "do_sample": True, "early_stopping": False, "num_beams": 1,
        "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 0.6, "top_k": 50, "top_p": 0.9,
        "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
        "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
        "forced_eos_token_id": 5, "remove_invalid_values": True, "suppress_tokens": [7],
        "begin_suppress_tokens": None, "exponential_decay_length_penalty": [15, 1.6],
        "architectures": ["OlmoeForCausalLM"], "finetuning_task": "x", "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "tokenizer_class": "GPTNeoXTokenizer", "prefix": "a", "bos_token_id": None,
        "sep_token_id": 3, "decoder_start_token_id": 4, "task_specific_params": {"x": 1}, "problem_type": None,
    },
    "transformers 4.5x": {
        "_attn_implementation_autoset": True, "_attn_implementation": "sdpa",
        "attn_implementation": "flash_attention_2",
        "_flash_attn_2_enabled": True, "_commit_hash": "0" * 40, "_pre_quantization_dtype": "bfloat16",
    },
    "transformers 5": {
        "dtype": "bfloat16", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "layer_types": ["full_attention", "full_attention"], "experts_implementation": "grouped_mm",
        "base_model_tp_plan": {"layers.*": "colwise"},
    },
    "fine-tuners": {
        "unsloth_version": "2025.6.1", "unsloth_fixed": True, "_unsloth_x": 1, "trl_version": "0.20",
        "peft_version": "1",
        "gradient_checkpointing": True, "use_flash_attention_2": True, "max_seq_length": 2048, "model_max_length": 4096,
        "use_cache": False, "auto_map": {"AutoConfig": "x.y"}, "transformers.js_config": {"dtype": "q4"},
    },
    "llama's": {
        "pretraining_tp": 1, "mlp_bias": False, "head_dim": 8, "rope_scaling": None, "partial_rotary_factor": 1.0,
        "sliding_window": None, "use_sliding_window": False, "max_window_layers": 2, "attn_logit_softcapping": None,
    },
    "other experts'": {
        "moe_intermediate_size": 16, "n_routed_experts": 64, "n_shared_experts": 0, "num_shared_experts": 0,
        "shared_expert_intermediate_size": 0, "decoder_sparse_step": 1, "mlp_only_layers": [], "n_group": 1,
        "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0, "router_jitter_noise": 0.0, "num_local_experts": 64, "use_qk_norm": True,
        "aux_loss_alpha": 0.001, "num_nextn_predict_layers": 0, "moe_layer_freq": 1,
    },
    "a window that is not used": {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
    "rope without scaling": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "factor": 1.0}},
    "rope with its length": {"rope_scaling": {"type": "default", "original_max_position_embeddings": 64}},
    "rope of one kind of layers": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta": 1e4,
    },
    "rope with nothing more": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0, "attention_factor": None},
    },
    "no quantization": {"quantization_config": None, "compression_config": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_accepted(name):
    assert read(**HARMLESS[name]) == PLAIN
    for key, value in HARMLESS[name].items():  # none leans on another, but a window on its switch
        if key not in ("sliding_window", "max_window_layers"):
            assert read(**{key: value}) == PLAIN, key


@pytest.mark.parametrize("value", [-1, -100, 2**32 - 1])
def test_ids_that_stand_for_no_token(value):
    assert read(pad_token_id=value).pad_token_id is None
    assert ModelConfig.from_dict(read(pad_token_id=value).to_dict()) == read(pad_token_id=None)


def test_a_linear_rope_of_one_kind_of_layers():
    section = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}
    assert read(rope_parameters=section).rope == RopeParameters(rope_type="linear", factor=2.0, rope_theta=5.0)


def test_everything_that_transformers_writes_is_read(tmp_path):
    OlmoeConfig(**HEADS, pad_token_id=None, eos_token_id=None).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_dict(raw).num_hidden_layers == 2
    full = OlmoeConfig(**HEADS, pad_token_id=None, eos_token_id=None).to_dict()
    assert ModelConfig.from_dict(full).num_hidden_layers == 2


def test_a_mark_before_the_text_is_no_content(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HEADS), encoding="utf-8-sig")
    assert ModelConfig.from_file(tmp_path / "config.json").hidden_size == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention"]),  # of two layers
        ("layer_types", ["linear_attention", "linear_attention"]),
        ("num_shared_experts", 1),
        ("n_shared_experts", 2),
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
        ("first_k_dense_replace", 1),
        ("moe_intermediate_size", 32),
        ("n_routed_experts", 8),
        ("scoring_func", "sigmoid"),
        ("routed_scaling_factor", 2.5),
        ("partial_rotary_factor", 0.5),
        ("mlp_bias", True),
        ("use_qk_norm", False),
        ("is_causal", False),
        ("position_embedding_type", "absolute"),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("residual_multiplier", 0.22),
        ("rope_local_base_freq", 10000.0),
        ("num_nextn_predict_layers", 1),
        ("vision_config", {"hidden_size": 3}),
        ("head_dim", 16),
        ("max_window_layers", 1),
        ("rms_norm_epsilon", 1e-6),
    ],
)
def test_what_would_change_the_network_is_refused_by_key_and_value(key, value):
    extra = {"sliding_window": 64} if key == "max_window_layers" else {}
    message = refused(lambda: read(**{key: value}, **extra))
    assert key in message or "sliding_window" in message
    if not extra:
        assert repr(value) in message


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3", "mrope", "proportional"])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_other_methods_of_scaling_are_named(section, kind):
    value = {"rope_type": kind, "factor": 4.0, "beta_fast": 32, "original_max_position_embeddings": 32}
    message = refused(lambda: read(**{section: value}))
    assert kind in message
    assert section in message


def test_rope_of_other_layers_is_refused():
    section = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    assert "sliding_attention" in refused(lambda: read(rope_parameters=section))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq"}, "awq"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ("quantization", {"group_size": 64, "bits": 4}, "group_size"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_weights_that_others_quantized_are_named_with_the_remedy(key, value, told):
    message = refused(lambda: read(**{key: value}))
    assert told in message
    assert "olmoe quantize" in message
    assert "remove it" not in message
