"""The `olmoe.*` metadata of GGUF to and from `ModelConfig`.

What llama.cpp reads was learnt from its sources (`llama-arch.cpp`, `llama-model.cpp`, `models/olmoe.cpp`) and is
verified by running it (`tests/weights/gguf/test_to_gguf_llama_cpp.py`). It fixes more than the metadata says: SiLU,
softmax over all experts without renormalisation, no clipping, no biases, as many KV heads as heads, NeoX RoPE without
a permutation of rows. A configuration that differs in these would load in llama.cpp and compute something else, so it
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoe.config import ModelConfig, RopeParameters
from olmoe.config_keys import NOTHING, is_no_token
from olmoe.errors import CheckpointError, ConfigError, shown
from olmoe.weights.gguf.reader import Value

ARCHITECTURE = "olmoe"
# Keys of up to three end-of-text ids; llama.cpp stops at each of them.
EOS_KEYS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
PADDING_KEY = "tokenizer.ggml.padding_token_id"

_REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_READ = {
    *_REQUIRED.values(),
    "attention.head_count_kv",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",  # the older name of the factor
    "vocab_size",
}
# Keys that change the network in llama.cpp's other architectures -> the values that leave OLMoE unchanged.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.output_scale": (0.0, 1.0),
    "attention.sliding_window_pattern": (False, 0, 1),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("",),
    "use_parallel_residual": (False, True),  # not read for OLMoE
}


def to_metadata(config: ModelConfig) -> dict[str, Value]:
    """The `olmoe.*` keys of a configuration.

    Raises `ConfigError` for settings that cannot be expressed and that llama.cpp's OLMoE would compute differently.
    """
    _check_expressible(config)
    metadata: dict[str, Value] = {
        f"{ARCHITECTURE}.{key}": getattr(config, field) for field, key in _REQUIRED.items()
    } | {
        f"{ARCHITECTURE}.attention.head_count_kv": config.kv_heads,
        f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{ARCHITECTURE}.rope.dimension_count": config.head_dim,
        f"{ARCHITECTURE}.rope.freq_base": float(config.rope.rope_theta),
        f"{ARCHITECTURE}.vocab_size": config.vocab_size,
    }
    if config.rope.rope_type == "linear":
        metadata[f"{ARCHITECTURE}.rope.scaling.type"] = "linear"
        metadata[f"{ARCHITECTURE}.rope.scaling.factor"] = float(config.rope.factor)
    metadata |= dict(zip(EOS_KEYS, config.eos_token_ids, strict=False))
    if config.eos_token_ids:
        # OLMoE has no start-of-text token; chat templates that ask for one get the end-of-text token.
        metadata["tokenizer.ggml.bos_token_id"] = config.eos_token_ids[0]
    if config.pad_token_id is not None:
        metadata[PADDING_KEY] = config.pad_token_id
    return metadata


def _check_expressible(config: ModelConfig) -> None:
    """Refuse a network that llama.cpp would silently compute differently."""
    differences = {
        "clip_qkv": config.clip_qkv is not None,
        "norm_topk_prob": config.norm_topk_prob,
        "attention_bias": config.attention_bias,
        "hidden_act": config.hidden_act not in ("silu", "swish"),
        "num_key_value_heads": config.kv_heads != config.num_attention_heads,
    }
    for name, differs in differences.items():
        if differs:
            raise ConfigError(
                f"GGUF cannot express {name} = {shown(getattr(config, name))}: llama.cpp would compute OLMoE "
                "without it, so the model is not written."
            )
    if config.rope.rope_type == "dynamic":
        raise ConfigError("GGUF cannot express dynamic RoPE scaling; only default and linear can be written.")
    if len(config.eos_token_ids) > len(EOS_KEYS):
        raise ConfigError(
            f"GGUF has at most {len(EOS_KEYS)} end-of-text ids, but eos_token_id lists {len(config.eos_token_ids)}; "
            "shorten the list."
        )


def to_config(metadata: Mapping[str, Value], vocab_size: int, *, tied: bool) -> ModelConfig:
    """The configuration that `metadata` describes; `vocab_size` is the number of rows of the embedding.

    Raises `CheckpointError` for another architecture, and for keys that are missing, of the wrong type or
    contradictory; `ConfigError` for values that no network can have. What GGUF does not store (dropout,
    initialisation, loss coefficients) gets `ModelConfig`'s defaults.
    """
    architecture = _plain(metadata.get("general.architecture"))
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"The GGUF file is of architecture {shown(architecture)}; only 'olmoe' can be read.")
    if (parts := _plain(metadata.get("split.count", 0))) not in (0, 1):
        raise CheckpointError(
            f"The GGUF file is one of {shown(parts)} parts; merge them first with llama.cpp's llama-gguf-split."
        )
    layers = _plain(metadata.get(f"{ARCHITECTURE}.block_count"))
    ours = {
        key.removeprefix(f"{ARCHITECTURE}."): _same_in_all_layers(value, layers)
        for key, value in metadata.items()
        if key.startswith(f"{ARCHITECTURE}.")
    }
    values: dict[str, Any] = {}
    for field, key in _REQUIRED.items():
        if key not in ours:
            raise CheckpointError(
                f"The GGUF file lacks the metadata key {ARCHITECTURE}.{key}; convert the model again."
            )
        values[field] = _plain(ours[key])
    if "attention.head_count_kv" in ours:
        values["num_key_value_heads"] = _plain(ours["attention.head_count_kv"])
    ends: list[Any] = []
    for key in EOS_KEYS:
        end = _token(metadata.get(key))
        if end is not None and end not in ends:
            ends.append(end)
    padding = _plain(metadata.get(PADDING_KEY))
    config = ModelConfig(
        **values,
        vocab_size=vocab_size,
        rope=_rope(ours),
        tie_word_embeddings=tied,
        eos_token_id=(ends[0] if len(ends) == 1 else tuple(ends)) if ends else None,
        pad_token_id=None if is_no_token(padding) else padding,
    )
    _check_neutral(ours, config)
    return config


def _rope(ours: Mapping[str, Value]) -> RopeParameters:
    theta: Any = _plain(ours.get("rope.freq_base", 10000.0))
    factor: Any = _plain(ours.get("rope.scaling.factor", ours.get("rope.scale_linear", 1.0)))
    kind = _plain(ours.get("rope.scaling.type", "linear" if "rope.scale_linear" in ours else "none"))
    if kind not in ("none", "linear"):
        raise CheckpointError(f"The GGUF file scales RoPE by the method {shown(kind)}; only linear can be read.")
    if kind == "none" or factor in (0.0, 1.0):
        return RopeParameters(rope_theta=theta)
    return RopeParameters(rope_theta=theta, rope_type="linear", factor=factor)


def _check_neutral(ours: Mapping[str, Value], config: ModelConfig) -> None:
    """Refuse keys that contradict the configuration or ask for what OLMoE does not have."""
    expected: dict[str, tuple[Any, ...]] = _NEUTRAL | {
        "attention.key_length": (config.head_dim,),
        "attention.value_length": (config.head_dim,),
        "expert_feed_forward_length": (config.intermediate_size,),
        "rope.dimension_count": (config.head_dim,),
        "rope.scaling.original_context_length": (config.max_position_embeddings,),
        "rope.scaling.finetuned": (False, True),
        "vocab_size": (config.vocab_size,),
    }
    for key, value in ours.items():
        if key in expected:
            if _plain(value) not in expected[key]:
                raise CheckpointError(
                    f"The GGUF file has {ARCHITECTURE}.{key} = {shown(_plain(value))}, but this network allows only "
                    f"{' or '.join(map(shown, expected[key]))}."
                )
        elif key not in _READ and _plain(value) not in NOTHING:
            raise CheckpointError(
                f"The GGUF file has the key {shown(f'{ARCHITECTURE}.{key}')} = {shown(_plain(value))}, which is "
                "unknown here and may change the network."
            )


def _token(value: Value | None) -> Any:
    """A token id; None for the number that means "there is none", -1 in 32 unsigned bits."""
    value = _plain(value)
    return None if isinstance(value, int) and value == 2**32 - 1 else value


def _same_in_all_layers(value: Value, layers: Any) -> Value:
    """The number in a list with one entry per layer, if it is the same for all; other values unchanged."""
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.size == 0 or value.size != layers:
        return value
    first: Value = value[0].item()
    return first if bool((value == value[0]).all()) else value


def _plain(value: Value | None) -> Any:
    """A metadata value as a Python object; an array, which no key here takes, becomes a description for messages.

    An fp32 number becomes the shortest decimal that stands for it: 1e-05, not 9.999999747378752e-06.
    """
    if isinstance(value, float):
        return float(str(np.float32(value)))
    return value[:8].tolist() if isinstance(value, np.ndarray) else value
