"""A GGUF file to a checkpoint folder in Hugging Face's per-expert layout, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from olmoe.errors import CheckpointError, shown
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder
from olmoe.io.tensor_file import SINGLE_NAME, TensorWriter
from olmoe.weights.gguf.encode import all_finite
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.names import Part, parameter_shapes, parts_of
from olmoe.weights.shards import MAX_SHARD_BYTES, cut, write_index

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

Progress = Callable[[int, int], None]


def to_folder(
    source: GGUFSource,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    overwrite: bool = False,
) -> None:
    """Write `config.json`, safetensors of at most `max_shard_bytes` and the tokenizer's files, atomically.

    Quantized weights are decoded and rounded once to `dtype`. `progress(done, total)` counts bytes. At most one
    tensor is in memory. Raises `CheckpointError` for values that `dtype` cannot hold, `TokenizerError` if the file
    has no tokenizer, `UserError` if the disk is full, or if `folder` holds anything; with `overwrite`, anything but
    the files of a checkpoint that was written like this.
    """
    files = source.files()
    names = {*files, "config.json", SINGLE_NAME}
    targets.check_folder(folder, names, overwrite=overwrite, shards=True, source=source.path)
    parts = {
        part.name: part for name, shape in parameter_shapes(source.config).items() for part in parts_of(name, shape)
    }
    sizes = {name: math.prod(part.shape) * dtype.itemsize for name, part in parts.items()}
    shards, total, done = cut(sizes, max_shard_bytes), sum(sizes.values()), 0
    with atomic_folder(folder) as temporary:
        for file, names_in_it in shards.items():
            declared = {name: (parts[name].shape, dtype) for name in names_in_it}
            with TensorWriter(temporary / file, declared, {"format": "pt"}) as out:
                for part in map(parts.__getitem__, names_in_it):
                    out.write(part.name, _converted(part, source.read(part.parameter, part.expert), dtype))
                    done += sizes[part.name]
                    if progress is not None:
                        progress(done, total)
        write_index(temporary, shards, total)
        config = source.config.to_json(str(dtype).removeprefix("torch."))
        for name, text in (files | {"config.json": config}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        # Again, because something may have appeared there.
        targets.check_folder(folder, names, overwrite=overwrite, shards=True, source=source.path)


def _converted(part: Part, value: Tensor, dtype: torch.dtype) -> Tensor:
    rows = value[part.first_row : part.first_row + part.shape[0]].to(dtype)
    if not all_finite(rows):
        raise CheckpointError(
            f"Tensor {shown(part.name)} has values that are not finite or too large for "
            f"{str(dtype).removeprefix('torch.')}; convert with --type bf16, or fetch the file again."
        )
    return rows
