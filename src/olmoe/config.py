"""`ModelConfig`: the architecture of one OLMoE model, to and from Hugging Face's `config.json`.

Both spellings of `config.json` are read: transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and transformers 5 (`rope_parameters`, `dtype`). A key unknown to this package is
refused if ignoring it could change the network, because a checkpoint that loads and computes
something else is the worst outcome.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from olmoe.config_keys import check_keys, is_no_token
from olmoe.errors import ConfigError, UserError, shown
from olmoe.io import json_file

ROPE_TYPES = ("default", "linear", "dynamic")

# Other keys that a RoPE section may have -> values with which they change nothing.
_NEUTRAL_ROPE: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "attention_factor": (1,),
    "mscale": (1,),
    "finetuned": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding: `rope_type` is default, linear or dynamic; `rope_theta` is the base period.

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
        eos: Any = self.eos_token_id
        if isinstance(eos, list):
            object.__setattr__(self, "eos_token_id", tuple(eos))
        self._check_sizes()
        self._check_values()
        self._check_tokens()

    def _check_sizes(self) -> None:
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

    def _check_values(self) -> None:
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

    def _check_tokens(self) -> None:
        if self.pad_token_id is not None and not _is_token_id(self.pad_token_id):
            raise ConfigError(f"pad_token_id must be null or a token id, not {shown(self.pad_token_id)}.")
        eos: Any = self.eos_token_id
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
        """All ids that end a text; empty if there are none."""
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
        """Parameters that one token uses: `num_experts_per_tok` experts per layer, both embeddings counted."""
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
            raise ConfigError(
                "The configuration lacks intermediate_size (the width of one expert); add it to config.json."
            )
        known = frozenset(f.name for f in fields(cls)) - {"rope"}
        values = {key: value for key, value in raw.items() if key in known}
        if is_no_token(values.get("pad_token_id")):
            values["pad_token_id"] = None
        if "num_local_experts" in raw:  # transformers' other name for the same number
            values.setdefault("num_experts", raw["num_local_experts"])
        values["rope"] = _rope_from_dict(raw)
        config = cls(**values)
        check_keys(raw, known, config)
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
        return cls.from_dict(read_object(path))

    def to_dict(self, dtype: str | None = None) -> dict[str, Any]:
        """The contents of a `config.json`, readable by transformers 4 and 5 (and llama.cpp's converter).

        Both RoPE spellings are written; they say the same, and readers use the one they know.
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


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a `config.json` holds. Raises `ConfigError` if it is missing or holds none."""
    path = Path(path)
    try:
        return json_file.read_object(path)
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}; a checkpoint folder needs a config.json.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}).") from None
    except TypeError as error:
        raise ConfigError(f"{path} must hold a JSON object, not {error}.") from None


def _rope_from_dict(raw: Mapping[str, Any]) -> RopeParameters:
    """Merge `rope_parameters` (v5) with `rope_theta` and `rope_scaling` (v4); contradictions are refused."""
    sections: list[Mapping[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = {} if raw.get(name) is None else raw[name]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be an object or null, not {shown(value)}.")
        value = _rope_of_full_attention(name, value)
        sections.append(value)
        _check_rope_keys(name, value, raw.get("max_position_embeddings", ModelConfig.max_position_embeddings))
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


def _rope_of_full_attention(name: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The RoPE section from one keyed by kind of layer, as transformers 5 writes it for models with several kinds."""
    if not section or not all(isinstance(value, Mapping) for value in section.values()):
        return section
    others = sorted(set(section) - {"full_attention"})
    if others:
        raise ConfigError(f"{name} describes layers of the kind {shown(others[0])}, which OLMoE does not have.")
    inner: Mapping[str, Any] = section["full_attention"]
    return inner


def _check_rope_keys(name: str, section: Mapping[str, Any], context: Any) -> None:
    """Refuse a RoPE section with a method or a key that would scale differently from ours."""
    kinds = [section[key] for key in ("rope_type", "type") if section.get(key) is not None]
    for kind in kinds:
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"{name} asks for rope_type {shown(kind)}, which is not supported; choose one of "
                f"{', '.join(ROPE_TYPES)}."
            )
    for key, value in section.items():
        ours = key in ("rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings")
        if not ours and value is not None and value not in _NEUTRAL_ROPE.get(key, ()):
            raise ConfigError(f"{name} has the unknown key {shown(key)} = {shown(value)}; remove it if it is unused.")
    original = section.get("original_max_position_embeddings")
    if original not in (None, context) and kinds not in ([], ["default"]):
        raise ConfigError(
            f"{name} has original_max_position_embeddings {shown(original)}, which must equal "
            "max_position_embeddings for OLMoE's linear and dynamic scaling."
        )


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
