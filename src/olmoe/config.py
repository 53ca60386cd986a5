"""`ModelConfig`: the architecture of one OLMoE model, to and from Hugging Face's `config.json`.

Both spellings of `config.json` are read: transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and transformers 5 (`rope_parameters`, `dtype`). What this package does not know is
refused when ignoring it could change the network, because a checkpoint that loads and computes
something else is the worst outcome.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError, shown
from olmoe.text_file import read_text

ROPE_TYPES = ("default", "linear", "dynamic")

# Keys of transformers' PreTrainedConfig that describe a file, a session or a task, never the network.
HARMLESS_KEYS = frozenset(
    "_name_or_path architectures auto_map bos_token_id dtype id2label label2id model_type name_or_path "
    "output_attentions output_hidden_states output_router_logits problem_type return_dict task_specific_params "
    "torch_dtype torchscript transformers_version use_cache chunk_size_feed_forward is_decoder "
    "is_encoder_decoder sep_token_id decoder_start_token_id num_labels _attn_implementation "
    "_experts_implementation cross_attention_hidden_size add_cross_attention tokenizer_class prefix "
    "finetuning_task num_local_experts rope_theta rope_scaling rope_parameters head_dim "
    "router_loss router_z_loss_coef".split()
)


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding: `rope_type` default, linear or dynamic; `rope_theta` the base period.

    `factor` stretches the context: linear divides positions by it (Chen et al. 2023), dynamic raises
    the base once a sequence outgrows `max_position_embeddings` (NTK-aware scaling).
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope_type {shown(self.rope_type)} is not supported; choose one of {', '.join(ROPE_TYPES)}."
            )
        if not _is_number(self.rope_theta) or self.rope_theta <= 0:
            raise ConfigError(f"rope_theta must be a positive number, not {shown(self.rope_theta)}.")
        if not _is_number(self.factor) or self.factor < 1:
            raise ConfigError(f"The RoPE scaling factor must be a number of at least 1, not {shown(self.factor)}.")
        if self.rope_type == "default" and self.factor != 1:
            raise ConfigError(
                f"A RoPE scaling factor of {self.factor} has no effect with rope_type 'default'; "
                "choose linear or dynamic."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of an OLMoE model. Field names are Hugging Face's; defaults are OLMoE-1B-7B-0924.

    `intermediate_size` is the width of one expert (1024 in the released models; transformers' class
    default of 2048 describes no released checkpoint). `eos_token_id` may be one id or several.

    Raises `ConfigError` on construction for values that no network can have.
    """

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None  # None: as many as attention heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 50279
    tie_word_embeddings: bool = False
    rope: RopeParameters = field(default_factory=RopeParameters)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    clip_qkv: float | None = None
    num_experts_per_tok: int = 8
    num_experts: int = 64
    router_aux_loss_coef: float = 0.01
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads max_position_embeddings num_experts num_experts_per_tok"
        ).split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(f"{name} must be a positive integer, not {shown(value)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"The head dimension must be even for RoPE, but is {self.head_dim}.")
        if self.head_dim == 2 and self.rope.rope_type == "dynamic":
            raise ConfigError("Dynamic RoPE scaling needs a head dimension above 2; use fewer attention heads.")
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}."
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}.")
        for name in ("rms_norm_eps", "initializer_range", "attention_dropout", "router_aux_loss_coef"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"{name} must be a number of at least 0, not {shown(value)}.")
        if self.clip_qkv is not None and (not _is_number(self.clip_qkv) or self.clip_qkv <= 0):
            raise ConfigError(f"clip_qkv must be null or a positive number, not {shown(self.clip_qkv)}.")
        for name in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {shown(getattr(self, name))}.")
        if not isinstance(self.hidden_act, str):
            raise ConfigError(f"hidden_act must be the name of an activation, not {shown(self.hidden_act)}.")
        if self.pad_token_id is not None and not _is_token_id(self.pad_token_id):
            raise ConfigError(f"pad_token_id must be null or a token id, not {shown(self.pad_token_id)}.")
        eos: Any = self.eos_token_id
        if isinstance(eos, list):
            eos = tuple(eos)
            object.__setattr__(self, "eos_token_id", eos)
        if eos is not None and not all(map(_is_token_id, eos if isinstance(eos, tuple) else (eos,))):
            raise ConfigError(f"eos_token_id must be null, a token id or a list of them, not {shown(eos)}.")

    # ---- derived sizes ----

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a text; empty if there is none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def parameter_counts(self) -> dict[str, int]:
        """Exact parameter counts by part: embeddings, attention, norms, routers, experts."""
        d, kv = self.hidden_size, self.kv_heads * self.head_dim
        attention = d * d * 2 + d * kv * 2 + (2 * d + 2 * kv if self.attention_bias else 0)
        layers = self.num_hidden_layers
        return {
            "embeddings": self.vocab_size * d * (1 if self.tie_word_embeddings else 2),
            "attention": layers * attention,
            "norms": layers * (3 * d + kv) + d,
            "routers": layers * self.num_experts * d,
            "experts": layers * self.num_experts * 3 * d * self.intermediate_size,
        }

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        return sum(self.parameter_counts().values())

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses: `num_experts_per_tok` experts a layer, both embeddings counted."""
        experts = self.parameter_counts()["experts"]
        return self.num_parameters - experts + experts // self.num_experts * self.num_experts_per_tok

    # ---- config.json ----

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the contents of a `config.json`, version 4 or 5 spelling.

        Raises `ConfigError` if the model type is not `olmoe`, a structural value is missing or invalid,
        or a key is present that may change the network and is not known here.
        """
        model_type = raw.get("model_type", "olmoe")
        if model_type != "olmoe":
            raise ConfigError(f"This is a configuration of model type {shown(model_type)}; only 'olmoe' can be loaded.")
        if "intermediate_size" not in raw:
            # transformers would assume 2048 here, which no released checkpoint has.
            raise ConfigError("The configuration lacks intermediate_size (the width of one expert); add it.")
        known = {f.name for f in fields(cls)} - {"rope"}
        values = {key: value for key, value in raw.items() if key in known}
        for key, value in raw.items():
            if key == "quantization_config" and isinstance(value, Mapping) and value.get("quant_method") == "olmoe":
                continue  # how our own packed files store the same network (olmoe.quant.layout)
            if key not in known and key not in HARMLESS_KEYS and value not in (None, False, 0, "", [], {}):
                raise ConfigError(
                    f"The configuration has {shown(key)} = {shown(value)}, which is unknown here and may change "
                    "the network; remove it if it does not matter."
                )
        if "num_local_experts" in raw:  # transformers' other name for the same number
            values.setdefault("num_experts", raw["num_local_experts"])
        values["rope"] = _rope_from_dict(raw)
        config = cls(**values)
        head_dim = raw.get("head_dim")
        if head_dim not in (None, config.head_dim):
            raise ConfigError(
                f"head_dim {shown(head_dim)} contradicts hidden_size / num_attention_heads = {config.head_dim}."
            )
        local_experts = raw.get("num_local_experts")
        if local_experts not in (None, config.num_experts):
            raise ConfigError(
                f"num_local_experts {shown(local_experts)} contradicts num_experts {config.num_experts}; keep one."
            )
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a `config.json`. Raises `ConfigError` if it is missing, not JSON, or invalid."""
        path = Path(path)
        try:
            raw = json.loads(read_text(path))
        except FileNotFoundError:
            raise ConfigError(f"There is no file {path}; a checkpoint folder needs a config.json.") from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}); check the path and its permissions."
            ) from None
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, endless digits or nesting
            raise ConfigError(f"{path} is not valid JSON ({error}).") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must hold a JSON object, not {type(raw).__name__}.")
        return cls.from_dict(raw)

    def to_dict(self, dtype: str | None = None) -> dict[str, Any]:
        """The contents of a `config.json`, readable by transformers 4 and 5 (and llama.cpp's converter).

        Both RoPE spellings are written; they say the same, and readers take the one that they know.
        `dtype` records how the weights are stored ("bfloat16", "float32", "float16").
        """
        values: dict[str, Any] = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"}
        for f in fields(self):
            if f.name != "rope":
                value = getattr(self, f.name)
                values[f.name] = list(value) if isinstance(value, tuple) else value
        rope = self.rope
        scaled = rope.rope_type != "default"
        values["rope_theta"] = rope.rope_theta
        values["rope_scaling"] = (
            {"type": rope.rope_type, "rope_type": rope.rope_type, "factor": rope.factor} if scaled else None
        )
        values["rope_parameters"] = {"rope_theta": rope.rope_theta, "rope_type": rope.rope_type}
        if scaled:
            values["rope_parameters"]["factor"] = rope.factor
        values["output_router_logits"] = False
        values["use_cache"] = True
        if dtype is not None:
            values["torch_dtype"] = values["dtype"] = dtype
        return values

    def to_json(self, dtype: str | None = None) -> str:
        """`to_dict` as the text of a `config.json`."""
        return json.dumps(self.to_dict(dtype), indent=2, sort_keys=True) + "\n"


def _rope_from_dict(raw: Mapping[str, Any]) -> RopeParameters:
    """Merge `rope_parameters` (v5) with `rope_theta` and `rope_scaling` (v4); contradictions are refused."""
    sections: list[Mapping[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = {} if raw.get(name) is None else raw[name]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be an object or null, not {shown(value)}.")
        sections.append(value)
        unknown = set(value) - {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"}
        unknown = {key for key in unknown if value[key] is not None}
        if unknown:
            raise ConfigError(f"{name} has unknown keys: {', '.join(sorted(unknown))}.")
        original = value.get("original_max_position_embeddings")
        if original not in (None, raw.get("max_position_embeddings", ModelConfig.max_position_embeddings)):
            raise ConfigError(
                f"{name} has original_max_position_embeddings {shown(original)}, which must equal "
                "max_position_embeddings for OLMoE's linear and dynamic scaling."
            )
    candidates = {
        "rope_theta": [section.get("rope_theta") for section in (*sections, raw)],
        "rope_type": [section.get(key) for section in sections for key in ("rope_type", "type")],
        "factor": [section.get("factor") for section in sections],
    }
    chosen: dict[str, Any] = {}
    for key, values in candidates.items():
        present = [value for value in values if value is not None]
        if any(value != present[0] for value in present):
            raise ConfigError(
                f"rope_parameters, rope_scaling and rope_theta contradict each other about {key} ({shown(present)}); "
                "keep one."
            )
        if present:
            chosen[key] = present[0]
    if chosen.get("rope_type") in ("linear", "dynamic") and "factor" not in chosen:
        raise ConfigError(f"RoPE scaling of type {chosen['rope_type']!r} needs a factor.")
    return RopeParameters(**chosen)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
