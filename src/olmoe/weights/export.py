"""Writing a model as a checkpoint folder in Hugging Face's per-expert layout."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from olmoe.errors import CheckpointError
from olmoe.io import targets
from olmoe.io.targets import some
from olmoe.io.tensor_file import SINGLE_NAME
from olmoe.model import CausalLM
from olmoe.weights import generation
from olmoe.weights.hf_folder import FLOAT_DTYPES, check_range, open_file
from olmoe.weights.names import parts_of
from olmoe.weights.shards import MAX_SHARD_BYTES, cut, write_index
from olmoe.weights.source import TRAVELLING

# In the metadata of weights that `save` wrote: which other files it wrote, apart from those that it always writes.
_EXTRA_FILES = "olmoe_extra_files"


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
    and only one is in memory. `extra_files` (name -> text) are written into the same folder.

    A folder that holds nothing but files written by `save` is replaced as a whole. With `overwrite`, a checkpoint from
    another writer is replaced too, and files that do not belong to a checkpoint are kept beside the new one. Anything
    else is refused with `CheckpointError`, because replacing it would delete it.
    """
    with replaced_folder(folder, extra_files or {}, overwrite) as temporary:
        unusual = sorted(set(extra_files or ()) - set(TRAVELLING))
        note = {_EXTRA_FILES: json.dumps(unusual)} if unusual else {}
        write_model(model, temporary, dtype=dtype, max_shard_bytes=max_shard_bytes, metadata=note)


@contextlib.contextmanager
def replaced_folder(folder: str | Path, extra_files: dict[str, str], overwrite: bool) -> Iterator[Path]:
    """A temporary folder for the block to write weights into, which becomes `folder` at its end; see `save`."""
    folder = Path(os.path.expanduser(folder))
    foreign = _check_target(folder, extra_files, overwrite)
    with targets.folder_that_keeps(folder, foreign) as temporary:
        yield temporary
        for name, text in extra_files.items():
            (temporary / name).write_text(text, encoding="utf-8")


def _check_target(folder: Path, extra_files: dict[str, str], overwrite: bool) -> list[str]:
    """The files to keep from an old folder; raises `CheckpointError` if something would be lost."""
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
    """The names of the extra files that `save` wrote into a folder, from the weights' metadata."""
    for file in (folder / SINGLE_NAME, *sorted(folder.glob("model-00001-of-*.safetensors"))):
        if file.is_file():
            with contextlib.suppress(CheckpointError, ValueError, TypeError), open_file(file) as handle:
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
    """`save` into an existing folder that the caller makes atomic; `metadata` is written into each shard."""
    tensors = dict(exported_tensors(model))
    for value in tensors.values():
        if value.dtype == torch.uint8:
            raise CheckpointError("A packed model cannot be written again; copy its folder, or pack another one.")
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


def _write_shard(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
    # Copies: safetensors refuses tensors that share storage, as the experts of one parameter do.
    copies = {name: value.to("cpu", dtype or value.dtype, copy=True).contiguous() for name, value in tensors.items()}
    for name, copy in copies.items():
        check_range(name, tensors[name], copy)
    save_tensors(copies, file, {"format": "pt"} | metadata)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises `OSError` if the file system refuses it, usually for a full disk."""
    file.touch()
    mode = file.stat().st_mode  # as the umask says; safetensors would leave the file private to its writer
    try:
        save_file(tensors, file, metadata=metadata)
        file.chmod(mode)
    except SafetensorError as error:
        # Errors of the file system arrive as text: "I/O error: No space left on device (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
