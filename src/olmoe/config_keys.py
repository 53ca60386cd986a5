"""Which keys of a `config.json` cannot change an OLMoE network; decides if a foreign configuration is read or refused.

Years of transformers versions, fine-tuners and converters leave keys that OLMoE does not know. Ignoring one that
describes the network would compute another model; refusing one that does not would refuse a good checkpoint. So a key
is accepted if it is known to be about something else, if its value is what OLMoE does anyway, or if it says nothing
(null, false, 0, empty); everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from olmoe.errors import ConfigError, shown

METHOD = "olmoe"  # of quantization: our own packed files
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})

# Keys about a file, a session, a task or training, never the network. Keys that start with _ are of this kind too.
_ABOUT_OTHERS = frozenset(
    "architectures auto_map dtype id2label label2id model_type name_or_path output_attentions output_hidden_states "
    "output_router_logits problem_type return_dict use_return_dict task_specific_params torch_dtype torchscript "
    "transformers.js_config use_cache chunk_size_feed_forward is_decoder is_encoder_decoder tie_encoder_decoder "
    "num_labels cross_attention_hidden_size add_cross_attention tokenizer_class prefix finetuning_task "
    "bos_token_id sep_token_id unk_token_id mask_token_id cls_token_id decoder_start_token_id classifier_dropout "
    "num_local_experts rope_theta rope_scaling rope_parameters head_dim pretraining_tp ep_size "
    "router_loss router_z_loss_coef z_loss_coef aux_loss_coef aux_loss_alpha seq_aux initializer_cutoff_factor "
    "model_max_length max_seq_length max_seq_len max_sequence_length seq_length n_positions n_ctx "
    "gradient_checkpointing trust_remote_code params_dtype pre_quantization_dtype use_bfloat16 tf_legacy_loss "
    "keys_to_ignore_at_inference base_model_tp_plan base_model_pp_plan base_model_ep_plan tp_plan pp_plan "
    # how texts are generated, which transformers 4 wrote here
    "temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff do_sample num_beams num_beam_groups "
    "num_return_sequences max_length min_length max_new_tokens min_new_tokens max_time stop_strings early_stopping "
    "length_penalty diversity_penalty repetition_penalty encoder_repetition_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids force_words_ids forced_bos_token_id forced_eos_token_id constraints "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias "
    "renormalize_logits guidance_scale penalty_alpha dola_layers watermarking_config output_scores output_logits "
    "return_dict_in_generate return_legacy_cache cache_implementation cache_config token_healing low_memory "
    "prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold is_assistant prefill_chunk_size disable_compile compile_config generation_config "
    "use_model_defaults".split()
)
# The same, by how a name starts or ends: which version wrote the file, how attention is computed, fine-tuners' notes.
_ABOUT_OTHERS_BY_NAME = re.compile(
    r"_.*|\w+_version|(\w+_)?(attn|attention|experts)_implementation|unsloth_\w+|use_flash_att\w*"
)
# What OLMoE has, so that false would remove it.
_HAS = frozenset("use_qk_norm qk_norm qk_layernorm is_causal causal use_rope".split())
# Keys of other architectures -> the values that describe OLMoE's own behaviour.
_AS_OLMOE_DOES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "partial_rotary_factor rotary_pct embedding_multiplier residual_multiplier logits_scaling logit_scale "
        "routed_scaling_factor n_group topk_group decoder_sparse_step moe_layer_freq interleave_moe_layer_step".split(),
        (1,),
    ),
    "scoring_func": ("softmax",),
    "topk_method": ("greedy",),
    "position_embedding_type": ("rope", "rotary"),
    "norm_type": ("rms", "rmsnorm", "rms_norm", "RMSNorm"),
    "sliding_window_pattern": (1,),
}
# Our name of a size -> its names elsewhere, whose values must be the same.
_OTHER_NAMES = {
    other: ours
    for ours, others in {
        "intermediate_size": "moe_intermediate_size expert_intermediate_size",
        "num_experts": "n_routed_experts num_routed_experts moe_num_experts",
        "num_experts_per_tok": "moe_top_k moe_topk num_selected_experts top_k_experts",
        "head_dim": "rotary_dim qk_head_dim v_head_dim kv_channels",
        "num_hidden_layers": "n_layers num_layers n_layer",
        "num_attention_heads": "n_heads num_heads n_head",
        "kv_heads": "n_kv_heads num_kv_heads num_query_groups",
        "hidden_size": "d_model n_embd",
        "hidden_act": "activation_function hidden_activation",
        "rms_norm_eps": "layer_norm_eps layer_norm_epsilon rms_norm_epsilon norm_eps",
        "max_position_embeddings": "original_max_position_embeddings",
    }.items()
    for other in others.split()
}


def check_keys(raw: Mapping[str, Any], known: frozenset[str], config: Any) -> None:
    """Raise `ConfigError` for the first key that may change the network; `config` was made from the `known` keys."""
    for key, value in raw.items():
        if key in ("quantization_config", "compression_config", "quantization"):
            check_quantization(key, value)
        elif key not in known and not _is_harmless(key, value, raw, config):
            raise ConfigError(
                f"The configuration has {shown(key)} = {shown(value)}, which is unknown here and may change "
                "the network; remove it if it does not matter."
            )


def check_quantization(key: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` of `quantization_config` is nothing, or our own."""
    if value in NOTHING:
        return
    method: Any = value.get("quant_method") if isinstance(value, Mapping) else value
    if isinstance(value, Mapping) and method is None:
        # Old files of bitsandbytes do not name the method; those of MLX give only the bits.
        method = "bitsandbytes" if "load_in_8bit" in value or "load_in_4bit" in value else dict(value)
    if method != METHOD:
        raise ConfigError(
            f"This checkpoint was quantized by {shown(method)} (see {key} in its config.json); load the unquantized "
            "one and pack it with `olmoe quantize`."
        )


def is_no_token(value: Any) -> bool:
    """Whether an id stands for "there is none": -1, or what it becomes in 32 unsigned bits."""
    return isinstance(value, int) and not isinstance(value, bool) and (value < 0 or value == 2**32 - 1)


def _is_harmless(key: str, value: Any, raw: Mapping[str, Any], config: Any) -> bool:
    """Whether a key that no field of `config` has leaves the network as it is."""
    if key in _ABOUT_OTHERS or _ABOUT_OTHERS_BY_NAME.fullmatch(key):
        return True
    if key in _HAS:
        return value in (None, True)
    if value in NOTHING or value in _AS_OLMOE_DOES.get(key, ()):
        return True
    if key in _OTHER_NAMES:
        return bool(value == getattr(config, _OTHER_NAMES[key]))
    if key == "layer_types":
        return value == ["full_attention"] * config.num_hidden_layers
    if key == "sliding_window":
        return raw.get("use_sliding_window") is False
    if key == "max_window_layers":  # how many layers have no window; meaningless when no layer has one
        return raw.get("sliding_window") in NOTHING or raw.get("use_sliding_window") is False
    return False
