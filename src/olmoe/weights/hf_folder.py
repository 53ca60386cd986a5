"""Hugging Face's checkpoint folders: tensor names on disk to and from the parameters of `model.CausalLM`.

Two layouts are read, in one file or in shards with an index:

- Hugging Face per-expert (what the hub holds, and what `export.save` writes):
  `model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight`;
- Hugging Face fused (transformers 5 in memory): `model.layers.N.mlp.experts.{gate_up_proj,down_proj}`.

Loading checks every name and shape against the configuration before it allocates anything, then streams tensor by
tensor: the peak is the target model plus one memory-mapped shard.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olmoe.config import ModelConfig, read_object
from olmoe.errors import CheckpointError, shown
from olmoe.io import foreign
from olmoe.io.targets import some
from olmoe.io.tensor_file import INDEX_NAME, SINGLE_NAME, read_index
from olmoe.model import CausalLM, allocate, without_values
from olmoe.weights import source
from olmoe.weights.names import EMBEDDING, HEAD, Part, count_layers, expert_part, parameter_shapes

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old versions of transformers stored; they follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, F16, BF16


class HFFolder:
    """A folder of safetensors: loads the model, or gives its matrices one by one (a `WeightSource`).

    For reading one by one, shards are mapped, and pages that were read are released.
    """

    layout = None  # nothing is packed

    def __init__(self, folder: Path, raw: Mapping[str, Any] | None = None) -> None:
        """Read configuration (or take `raw`) and headers. Raises `ConfigError` or `CheckpointError`."""
        self.config = ModelConfig.from_dict(read_object(folder / "config.json") if raw is None else raw)
        self.stored = read_headers(folder)
        self._folder = folder
        self._handles: dict[Path, Any] = {}
        self._read_bytes = 0

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def num_bytes(self) -> int:
        """The size of its weight files."""
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.stored.values()})

    @property
    def format(self) -> str:
        """The dtype that most of its weights are stored in."""
        return str(dominant_dtype(self.stored)).removeprefix("torch.")

    @property
    def dtypes(self) -> list[str]:
        """Names of the dtypes of its tensors, after a check against the configuration."""
        _ = self.parts
        return sorted({tensor.dtype for tensor in self.stored.values()})

    @functools.cached_property
    def parts(self) -> dict[str, Part]:
        """What each stored tensor is; see `plan` for the errors."""
        return plan(self.config, self.stored)

    def check(self) -> None:
        """Raise `CheckpointError` if the tensors do not fit the configuration."""
        _ = self.parts
        check_tie(self.config, self.stored)

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> CausalLM:
        """The model, in evaluation mode without gradients; `dtype` None keeps what is stored.

        `progress(done, total)` is called after each tensor. Raises `CheckpointError` for everything that can be wrong
        with the files, and if memory does not suffice.
        """
        self.check()
        config, stored, parts = self.config, self.stored, self.parts
        if dtype is None:
            dtype = dominant_dtype(stored)
        model = without_values(config)
        try:
            model = allocate(model.to(dtype), device).eval().requires_grad_(False)
        except RuntimeError as error:  # torch's OutOfMemoryError is one
            size = f"{config.num_parameters * dtype.itemsize / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}"
            raise CheckpointError(
                f"The model does not fit: {size} could not be allocated on {device}; "
                "choose a smaller dtype or another device."
            ) from error
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight  # now they are two
        parameters = dict(model.named_parameters())
        done = 0
        for file in sorted({tensor.file for name, tensor in stored.items() if name in parts}):
            names = [name for name, tensor in stored.items() if tensor.file == file and name in parts]
            for name, value in _read_tensors(file, names):
                target = parameters[parts[name].parameter].data[parts[name].index]
                target.copy_(value)
                check_range(name, value, target)
                done += 1
                if progress is not None:
                    progress(done, len(parts))
                del value  # it keeps its whole shard mapped
        return model

    @functools.cached_property
    def _names(self) -> dict[tuple[str, int | None], list[str]]:
        """The tensors that hold a parameter, or one expert's matrix of it, in the order of their rows."""
        names: dict[tuple[str, int | None], list[str]] = {}
        # The gate comes first in a fused matrix, and its rows start at 0.
        for name, part in sorted(self.parts.items(), key=lambda item: item[1].first_row):
            names.setdefault((part.parameter, part.expert), []).append(name)
        return names

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        names = self._names.get((parameter, expert))
        if names is None:  # a stack that is stored fused
            (name,) = self._names[parameter, None]
            return self._counted(self._handle(self.stored[name].file).get_slice(name)[expert])
        parts = [self._counted(self._handle(self.stored[name].file).get_tensor(name)) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @functools.cached_property
    def parameter_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each parameter is stored in; if its tensors differ, one that can hold all their values."""
        found: dict[str, torch.dtype] = {}
        for name, part in self.parts.items():
            dtype = FLOAT_DTYPES[self.stored[name].dtype]
            found[part.parameter] = torch.promote_types(found.get(part.parameter, dtype), dtype)
        return found

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return source.texts_of(self._folder)

    def _counted(self, value: Tensor) -> Tensor:
        """A copy, which keeps no file mapped."""
        copy = value.clone()
        self._read_bytes += copy.nbytes
        if self._read_bytes >= source.RELEASE_BYTES:
            self._handles.clear()
            self._read_bytes = 0
        return copy

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._handles[file]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors of a checkpoint folder, without reading their values.

    Raises `CheckpointError` if there are no safetensors files, a shard of the index is missing, or a file
    is truncated or not safetensors.
    """
    weight_map: dict[str, Any] = {}
    if (folder / SINGLE_NAME).is_file():  # takes precedence over an index, as in transformers
        files = [SINGLE_NAME]
    elif (folder / INDEX_NAME).is_file():
        weight_map = read_index(folder / INDEX_NAME)
        files = sorted(set(weight_map.values()))
    else:
        hint = foreign.other_weights(folder)
        raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}.")
    stored: dict[str, StoredTensor] = {}
    for file in map(folder.joinpath, files):
        if not os.path.isfile(file):
            raise CheckpointError(f"The shard {shown(file.name)} that the index names is missing from {folder}.")
        with open_file(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle, not a dict)
                if name in stored:
                    raise CheckpointError(f"Tensor {shown(name)} is in both {stored[name].file.name} and {file.name}.")
                part = handle.get_slice(name)
                stored[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
    if set(weight_map) - set(stored):
        missing = sorted(set(weight_map) - set(stored))
        raise CheckpointError(f"The index lists {some(missing)}, which the shards do not hold.")
    return stored


def plan(config: ModelConfig, stored: dict[str, StoredTensor]) -> dict[str, Part]:
    """Match stored tensors to parameters by name and shape. Raises `CheckpointError` on any mismatch."""
    if (layers := count_layers(stored)) != config.num_hidden_layers:
        foreign.check_names(stored)
        # Checked before names are listed, so that a hostile layer count cannot fill the memory.
        raise CheckpointError(
            f"config.json says {config.num_hidden_layers} layers, but the checkpoint holds tensors of {layers}."
        )
    parts: dict[str, Part] = {}
    expected = parameter_shapes(config)
    for name, tensor in stored.items():
        if IGNORED.search(name) or (config.tie_word_embeddings and name == HEAD and EMBEDDING in stored):
            continue
        part = _part(config, name, expected)
        if part is None:
            foreign.check_names(stored)
            raise CheckpointError(
                f"The checkpoint holds the tensor {shown(name)}, which OLMoE with this config.json does not have."
            )
        if tensor.shape != part.shape:
            raise CheckpointError(
                f"Tensor {shown(name)} has shape {list(tensor.shape)}, but config.json makes it {list(part.shape)}."
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"Tensor {shown(name)} is stored as {tensor.dtype}; only {', '.join(FLOAT_DTYPES)} can be loaded."
            )
        parts[name] = part
    _check_complete(config, parts, expected)
    return parts


def check_tie(config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    """Raise `CheckpointError` if the embeddings are tied, but both matrices are stored and differ."""
    if not (config.tie_word_embeddings and HEAD in stored and EMBEDDING in stored):
        return
    head, embedding = (next(_read_tensors(stored[name].file, [name]))[1] for name in (HEAD, EMBEDDING))
    if head.shape != embedding.shape or not torch.equal(head.float(), embedding.float()):
        raise CheckpointError(
            "config.json ties the embeddings, but the checkpoint holds a different lm_head.weight; "
            "set tie_word_embeddings to false if that is the one to use."
        )


def dominant_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that most of a checkpoint's values are stored in."""
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        if tensor.dtype in FLOAT_DTYPES:  # ignored tensors may have others
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return FLOAT_DTYPES[max(sizes, key=sizes.__getitem__)]


def _part(config: ModelConfig, name: str, expected: dict[str, tuple[int, ...]]) -> Part | None:
    """Which part of the network the tensor `name` is, or None if there is none."""
    if name == HEAD and config.tie_word_embeddings:  # the one matrix, under its other name
        name = EMBEDDING
    if name in expected:
        return Part(name, expected[name], name)
    part = expert_part(name, config)
    return part if part is not None and part.parameter in expected else None


def _check_complete(config: ModelConfig, parts: dict[str, Part], expected: dict[str, tuple[int, ...]]) -> None:
    """Every element of every parameter must come from exactly one stored tensor."""
    filled = dict.fromkeys(expected, 0)
    for part in parts.values():
        filled[part.parameter] += math.prod(part.shape)
    missing = [name for name, shape in expected.items() if filled[name] < math.prod(shape)]
    if missing:
        hint = "; set tie_word_embeddings to true if the embeddings are its head too" if missing == [HEAD] else ""
        raise CheckpointError(f"The checkpoint lacks {some(missing)}, which config.json calls for{hint}.")
    double = [name for name, shape in expected.items() if filled[name] > math.prod(shape)]
    if double:
        raise CheckpointError(f"The checkpoint holds {some(double)} in two layouts at once; keep one.")


def check_range(name: str, value: Tensor, converted: Tensor) -> None:
    """Raise `CheckpointError` for a weight beyond 65504: float16 would make it infinite, and every text nonsense."""
    if converted.dtype == torch.float16 and value.dtype != torch.float16:
        low, high = torch.aminmax(converted)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"Tensor {shown(name)} has values that float16 cannot hold; use bfloat16 or float32.")


def _read_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    with open_file(file) as handle:
        for name in names:
            yield name, handle.get_tensor(name)


def open_file(file: Path) -> Any:
    """`safe_open`, with one sentence for everything that can be wrong with the file."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        foreign.check_contents(file, "safetensors file")
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); fetch it again.") from None
