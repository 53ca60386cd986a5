"""What `save_pretrained` of the Hugging Face face stores in nf4, fp4 or int8, as `config.json` and its tensors say it.

    {"quant_method": "olmoe", "weight_format": "nf4", "double_quant": true, "compute_dtype": "bfloat16",
     "skip_modules": ["lm_head"]}

`skip_modules` are patterns in transformers' own language, so which matrices are packed is taken from the tensors: those
that have scales beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from olmoe.errors import CheckpointError, shown
from olmoe.quant.formats import Format, make_format, saved_formats

_COMPUTE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALES = "_absmax"
_KNOWN = {"quant_method", "weight_format", "double_quant", "compute_dtype", "skip_modules", "overrides", "recipe"}


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
        """Read `quantization_config` of a file with those tensors. Raises `CheckpointError` for what is not known."""
        unknown = sorted(map(str, set(raw) - _KNOWN))
        if unknown:
            raise CheckpointError(
                f"quantization_config holds {shown(unknown[0])}, which this version of olmoe does not know; load the "
                "checkpoint with the version that wrote it."
            )
        name, double_quant, compute = raw["weight_format"], raw.get("double_quant"), raw.get("compute_dtype")
        if name not in saved_formats() or double_quant not in (None, False, True) or raw.get("overrides"):
            raise CheckpointError(
                f"quantization_config asks for {shown(name)} with double_quant {shown(double_quant)} and overrides "
                f"{shown(raw.get('overrides'))}, which no version of olmoe saves."
            )
        if not isinstance(compute, str | None) or compute not in _COMPUTE_DTYPES:
            raise CheckpointError(
                f"compute_dtype {shown(compute)} of quantization_config is none that models compute in."
            )
        packed = frozenset(
            tensor.removesuffix(_SCALES)
            for tensor in tensor_names
            if tensor.endswith(_SCALES) and not tensor.endswith("_nested_absmax")
        )
        return cls(name, bool(double_quant), _COMPUTE_DTYPES[compute], packed)

    def format_of(self, parameter: str, rows: int, columns: int) -> Format | None:
        """The format of a matrix of this shape; None where it stays plain."""
        if parameter not in self.packed_names:
            return None
        return make_format(self.weight_format, self.double_quant)
