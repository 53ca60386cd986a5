"""Checkpoints: tensor names on disk to and from the parameters of `model.CausalLM`.

Two layouts are read, in one file or in shards with an index:

- Hugging Face per-expert (what the hub holds, and what `save` writes):
  `model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight`;
- Hugging Face fused (transformers 5 in memory): `model.layers.N.mlp.experts.{gate_up_proj,down_proj}`.

A folder whose `config.json` has a `quantization_config` is a packed one, which `olmoe.weights.packed` reads.

Loading checks every name and shape against the configuration before it allocates anything, then streams
tensor by tensor: the peak is the target model plus one memory-mapped shard.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olmoe.config import ModelConfig, read_object
from olmoe.errors import CheckpointError, shown
from olmoe.io import foreign, hub, targets
from olmoe.io.targets import some
from olmoe.io.tensor_file import INDEX_NAME, SINGLE_NAME, TensorFiles, read_index
from olmoe.model import CausalLM, allocate, without_values
from olmoe.weights import generation, packed
from olmoe.weights.names import EMBEDDING, HEAD, Part, count_layers, expert_part, parameter_shapes, parts_of
from olmoe.weights.shards import MAX_SHARD_BYTES, cut, write_index
from olmoe.weights.table import Layout

# Text files of a checkpoint folder that go where its weights go.
TRAVELLING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    generation.FILE_NAME,
)
# In the metadata of weights that `save` wrote: which files it wrote beside them, but for those.
_EXTRA_FILES = "olmoe_extra_files"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old transformers versions stored; they follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, F16, BF16


class Checkpoint:
    """A model on disk: where it lies, and its configuration and the headers of its weights, each read once.

    `layout` says how a packed checkpoint stores its matrices; None for one in floating dtypes.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers in `folder`. Raises `CheckpointError` or `ConfigError` for what is wrong with them."""
        self.folder = folder
        self.layout: Layout | None = None
        raw = read_object(folder / "config.json")
        if packed.holds_packed(raw):
            self.config, self.layout, self._files = packed.open_folder(folder, raw)
            return
        self.config = ModelConfig.from_dict(raw)
        self.stored = read_headers(folder)

    @classmethod
    def open(
        cls,
        model_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """The checkpoint in a folder, or of a hub id, which is fetched if it is not here yet."""
        return cls(hub.resolve(model_id, revision=revision, token=token, local_files_only=local_files_only))

    @functools.cached_property
    def parts(self) -> dict[str, Part]:
        """What each stored tensor of an unpacked checkpoint is; see `plan` for the errors."""
        parts = plan(self.config, self.stored)
        check_tie(self.config, self.stored)
        return parts

    @property
    def packed_files(self) -> TensorFiles:
        """The tensors of a packed checkpoint, mapped."""
        assert self.layout is not None, f"{self.folder} is not packed"
        return self._files

    @property
    def num_bytes(self) -> int:
        """The size of its files of weights."""
        if self.layout is not None:
            return self._files.num_bytes
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.stored.values()})

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> CausalLM:
        """The model; see the function `load` for the arguments and errors."""
        if self.layout is not None:
            return packed.load_files(
                self.config, self.layout, self._files, dtype=dtype, device=device, progress=progress
            )
        return _load_plain(self, dtype, device, progress)


def load(
    model_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load a model from a folder or a hub id, in evaluation mode without gradients.

    `dtype` is that of the parameters in memory; None keeps what is stored. Of a packed checkpoint it is that of
    hidden states and products, fp32 by default. `progress(done, total)` is called after each tensor. Raises
    `CheckpointError` or `ConfigError` with one sentence for everything that can be wrong with the files; nothing is
    returned half-loaded.
    """
    found = Checkpoint.open(model_id, revision=revision, token=token, local_files_only=local_files_only)
    return found.load(dtype=dtype, device=device, progress=progress)


def _load_plain(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
) -> CausalLM:
    config, stored, parts = checkpoint.config, checkpoint.stored, checkpoint.parts
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
            place = parameters[parts[name].parameter].data[parts[name].index]
            place.copy_(value)
            _check_range(name, value, place)
            done += 1
            if progress is not None:
                progress(done, len(parts))
            del value  # it keeps its whole shard mapped
    return model


def save(
    model: CausalLM,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write `config.json`, `generation_config.json` and safetensors in the per-expert layout, atomically.

    `dtype` converts while writing; None keeps each parameter's. Shards hold at most `max_shard_bytes`,
    and only one exists in memory. `extra_files` (name -> text) are written into the same folder.

    A folder that holds nothing but files of `save` is replaced whole. With `overwrite`, a checkpoint of another
    writer is replaced too, and what does not belong to a checkpoint stays beside the new one. All else is refused with
    `CheckpointError`, because replacing it would delete it.
    """
    folder = Path(os.path.expanduser(folder))
    foreign = _check_target(folder, extra_files or {}, overwrite)
    with targets.folder_that_keeps(folder, foreign) as temporary:
        unusual = sorted(set(extra_files or ()) - set(TRAVELLING))
        note = {_EXTRA_FILES: json.dumps(unusual)} if unusual else {}
        write_model(model, temporary, dtype=dtype, max_shard_bytes=max_shard_bytes, metadata=note)
        for name, text in (extra_files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def _check_target(folder: Path, extra_files: dict[str, str], overwrite: bool) -> list[str]:
    """What stays of an old folder; raises `CheckpointError` if something would be lost."""
    if not folder.is_dir() or not targets.entries(folder):
        return []
    targets.check_is_checkpoint(folder, "saving")
    written = _files_of_save(folder)
    names = {SINGLE_NAME, "config.json", generation.FILE_NAME, *extra_files, *written}
    foreign = targets.foreign_entries(folder, names, shards=True)
    if foreign and not overwrite:
        raise CheckpointError(
            f"{folder} holds {some(foreign)}, which saving would delete; choose a new folder, or keep it "
            "beside the new checkpoint with overwrite=True."
        )
    return foreign


def _files_of_save(folder: Path) -> list[str]:
    """The names of the extra files that `save` wrote into a folder, as the weights' metadata say."""
    for file in (folder / SINGLE_NAME, *sorted(folder.glob("model-00001-of-*.safetensors"))):
        if file.is_file():
            with contextlib.suppress(CheckpointError, ValueError, TypeError), _open(file) as handle:
                names = json.loads((handle.metadata() or {}).get(_EXTRA_FILES, "[]"))
                return [name for name in names if isinstance(name, str)]
    return []


def write_model(
    model: CausalLM,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> None:
    """`save` into an existing folder that the caller makes atomic; `metadata` are written into each shard."""
    tensors = dict(exported_tensors(model))
    for value in tensors.values():
        if value.dtype == torch.uint8:
            raise CheckpointError("A packed model is not written again; copy its folder, or pack another one.")
        if (dtype or value.dtype) not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"Weights cannot be saved as {dtype or value.dtype}; use float32, bfloat16 or float16."
            )
    sizes = {name: value.numel() * (dtype or value.dtype).itemsize for name, value in tensors.items()}
    shards = cut(sizes, max_shard_bytes)
    for file, names in shards.items():
        _write_shard(folder / file, {name: tensors[name] for name in names}, dtype, metadata or {})
    write_index(folder, shards, sum(sizes.values()))
    stored = dtype or next(model.parameters()).dtype
    (folder / "config.json").write_text(model.config.to_json(str(stored).removeprefix("torch.")), encoding="utf-8")
    (folder / generation.FILE_NAME).write_text(generation.generation_text(model.config), encoding="utf-8")


def exported_tensors(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the per-expert layout by name, as views of the parameters."""
    for name, parameter in model.named_parameters():
        for part in parts_of(name, tuple(parameter.shape)):
            yield part.name, parameter.detach()[part.index]


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors of a checkpoint folder, without reading their values.

    Raises `CheckpointError` if there are no safetensors files, a shard of the index is missing, or a file
    is truncated or not safetensors.
    """
    weight_map: dict[str, Any] = {}
    if (folder / SINGLE_NAME).is_file():  # wins over an index, as in transformers
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
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle, not a dict)
                if name in stored:
                    raise CheckpointError(f"Tensor {shown(name)} is in both {stored[name].file.name} and {file.name}.")
                part = handle.get_slice(name)
                stored[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
    if set(weight_map) - set(stored):
        missing = sorted(set(weight_map) - set(stored))
        raise CheckpointError(f"The index promises {some(missing)}, which the shards do not hold.")
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


def _write_shard(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
    # Copies: safetensors refuses tensors that share storage, as the experts of one parameter do.
    copies = {name: value.to("cpu", dtype or value.dtype, copy=True).contiguous() for name, value in tensors.items()}
    for name, copy in copies.items():
        _check_range(name, tensors[name], copy)
    file.touch()
    mode = file.stat().st_mode  # the umask's; safetensors would leave the file private to its writer
    try:
        save_file(copies, file, metadata={"format": "pt"} | metadata)
        file.chmod(mode)
    except SafetensorError as error:
        # What the file system refused arrives as text: "I/O error: No space left on device (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def _check_range(name: str, value: Tensor, converted: Tensor) -> None:
    """float16 ends at 65504; a larger weight becomes infinite, and every text after it nonsense."""
    if converted.dtype == torch.float16 and value.dtype != torch.float16:
        low, high = torch.aminmax(converted)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"Tensor {shown(name)} has values that float16 cannot hold; use bfloat16 or float32.")


def _read_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    with _open(file) as handle:
        for name in names:
            yield name, handle.get_tensor(name)


def _open(file: Path) -> Any:
    """`safe_open`, with what can be wrong with the file in one sentence."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        foreign.check_contents(file, "safetensors file")
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); fetch it again.") from None
