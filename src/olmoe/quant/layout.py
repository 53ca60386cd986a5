"""Which format each matrix of a packed checkpoint has, as stored in `config.json` under `quantization_config`.

`PackedLayout` is the layout of a folder written by `olmoe quantize`:

    {"quant_method": "olmoe", "weight_format": "q4_0", "recipe": "int4",
     "overrides": {"lm_head": "q8_0", "model.layers.*.self_attn.v_proj": "q8_0"}}

Keys of `overrides` are names of parameters without a final `.weight`, or patterns in which `*` stands for any
characters. A name that is listed itself has its own format, others have that of the longest matching pattern. "bf16"
leaves a matrix plain, in whatever floating dtype it is stored.

`SavedLayout` is the layout of what the Hugging Face face's `save_pretrained` stores in nf4, fp4 or int8:

    {"quant_method": "olmoe", "weight_format": "nf4", "double_quant": true, "compute_dtype": "bfloat16",
     "skip_modules": ["lm_head"]}

`skip_modules` are patterns in transformers' own syntax, so the tensors themselves tell which matrices are packed: those
with scales beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch

from olmoe.config_keys import METHOD
from olmoe.errors import CheckpointError, shown
from olmoe.quant.formats import PLAIN, Format, layout_formats, make_format, saved_formats

# More entries and longer names than any checkpoint needs; a hostile file cannot keep the matcher busy.
MAX_OVERRIDES, MAX_PATTERN = 4096, 200
_COMPUTE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALES = "_absmax"
_KNOWN = {"quant_method", "weight_format", "overrides", "recipe", "compute_dtype", "skip_modules", "double_quant"}


@dataclass(frozen=True)
class PackedLayout:
    """The formats of all matrices: `weight_format`, and exceptions from it. See the module for `overrides`."""

    weight_format: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    recipe: str | None = None  # how the scales were chosen; for display
    compute_dtype: ClassVar[None] = None  # products are computed in the dtype of hidden states

    def __post_init__(self) -> None:
        known = layout_formats()
        if self.weight_format not in known:
            raise CheckpointError(
                f"The weights are packed as {shown(self.weight_format)}; only {', '.join(known)} can be loaded here."
            )
        if not isinstance(self.overrides, Mapping) or len(self.overrides) > MAX_OVERRIDES:
            raise CheckpointError(
                f"overrides of quantization_config must be an object of at most {MAX_OVERRIDES} names."
            )
        for pattern, name in self.overrides.items():
            if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN or pattern.count("*") > 4:
                raise CheckpointError(f"quantization_config overrides {shown(pattern)}, which names no matrix.")
            if not isinstance(name, str) or name not in (*known, PLAIN):
                raise CheckpointError(
                    f"quantization_config stores {shown(pattern)} as {shown(name)}; choose "
                    f"{', '.join((*known, PLAIN))}."
                )
        if self.recipe is not None and not isinstance(self.recipe, str):
            raise CheckpointError(f"The recipe of quantization_config must be a text, not {shown(self.recipe)}.")

    @classmethod
    def from_dict(cls, raw: Any) -> PackedLayout:
        """Read `quantization_config`. Raises `CheckpointError` for anything unknown."""
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"quantization_config must be an object, not {shown(raw)}.")
        if raw.get("quant_method") != METHOD:
            raise CheckpointError(
                f"This checkpoint was quantized by {shown(raw.get('quant_method'))}; load the unquantized one and "
                "pack it with `olmoe quantize`."
            )
        _check_known(raw)
        if raw.get("weight_format") in saved_formats():
            raise CheckpointError(
                f"This checkpoint was saved in {raw['weight_format']} by save_pretrained; load it with "
                "olmoe.OlmoeForCausalLM.from_pretrained, or pack the original with `olmoe quantize`."
            )
        return cls(raw.get("weight_format"), raw.get("overrides") or {}, raw.get("recipe"))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        values: dict[str, Any] = {"quant_method": METHOD, "weight_format": self.weight_format}
        if self.recipe is not None:
            values["recipe"] = self.recipe
        return values | {"overrides": dict(self.overrides)}

    def name_of(self, parameter: str) -> str:
        """The name of the format of `parameter`, one of `layout_formats()` or "bf16"."""
        name = parameter.removesuffix(".weight")
        if name in self.overrides:
            return self.overrides[name]
        fitting = [pattern for pattern in self.overrides if "*" in pattern and fnmatchcase(name, pattern)]
        return self.overrides[max(fitting, key=lambda p: (len(p), p))] if fitting else self.weight_format

    def format_of(self, parameter: str, rows: int, columns: int) -> Format | None:
        """The format of a matrix of this shape; None if it stays plain."""
        name = self.name_of(parameter)
        format = None if name == PLAIN else make_format(name)
        return format if format is not None and format.fits(rows, columns) else None


@dataclass(frozen=True)
class SavedLayout:
    """The formats of all matrices: one of `saved_formats()` for those of `packed_names`, the others plain."""

    weight_format: str
    double_quant: bool
    compute_dtype: torch.dtype | None  # of products; None: that of hidden states
    packed_names: frozenset[str]
    recipe: str | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], tensor_names: Collection[str]) -> SavedLayout:
        """Read `quantization_config` of a file with these tensors. Raises `CheckpointError` for anything unknown."""
        _check_known(raw)
        name, double_quant, compute = raw["weight_format"], raw.get("double_quant"), raw.get("compute_dtype")
        if name not in saved_formats() or double_quant not in (None, False, True) or raw.get("overrides"):
            raise CheckpointError(
                f"quantization_config asks for {shown(name)} with double_quant {shown(double_quant)} and overrides "
                f"{shown(raw.get('overrides'))}, which no version of olmoe saves."
            )
        if not isinstance(compute, str | None) or compute not in _COMPUTE_DTYPES:
            raise CheckpointError(
                f"compute_dtype {shown(compute)} of quantization_config is not one that models compute in."
            )
        packed = frozenset(
            tensor.removesuffix(_SCALES)
            for tensor in tensor_names
            if tensor.endswith(_SCALES) and not tensor.endswith("_nested_absmax")
        )
        return cls(name, bool(double_quant), _COMPUTE_DTYPES[compute], packed)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds; which matrices are packed is left to the tensors."""
        compute = next(name for name, dtype in _COMPUTE_DTYPES.items() if dtype is self.compute_dtype)
        return {
            "quant_method": METHOD,
            "weight_format": self.weight_format,
            "double_quant": self.double_quant,
            "compute_dtype": compute,
            "skip_modules": None,
        }

    def format_of(self, parameter: str, rows: int, columns: int) -> Format | None:
        """The format of a matrix of this shape; None if it stays plain."""
        if parameter not in self.packed_names:
            return None
        return make_format(self.weight_format, self.double_quant)


Layout = PackedLayout | SavedLayout


def _check_known(raw: Mapping[str, Any]) -> None:
    unknown = sorted(map(str, set(raw) - _KNOWN))
    if unknown:
        raise CheckpointError(
            f"quantization_config holds {shown(unknown[0])}, which this version of olmoe does not know; load the "
            "checkpoint with the version that wrote it."
        )
