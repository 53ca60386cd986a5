"""A GGUF file to a checkpoint folder in Hugging Face's per-expert layout, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from olmoe.errors import CheckpointError, shown
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder
from olmoe.io.tensor_file import INDEX_NAME, SINGLE_NAME, TensorWriter
from olmoe.weights.checkpoint import MAX_SHARD_BYTES, parameter_shapes
from olmoe.weights.gguf.encode import all_finite
from olmoe.weights.gguf.names import DOWN, GATE_UP
from olmoe.weights.gguf.source import GGUFSource

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Target:
    """One tensor of the folder: its shape, and the parameter, expert and rows that it is."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    first_row: int = 0


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
    shards = _shards(list(_targets(source)), dtype.itemsize, max_shard_bytes)
    total = sum(_size(target, dtype.itemsize) for shard in shards for target in shard)
    done = 0
    with atomic_folder(folder) as temporary:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            declared = {target.name: (target.shape, dtype) for target in shard}
            with TensorWriter(temporary / file, declared, {"format": "pt"}) as out:
                for target in shard:
                    value = source.read(target.parameter, target.expert)
                    out.write(target.name, _converted(target, value, dtype))
                    weight_map[target.name] = file
                    done += _size(target, dtype.itemsize)
                    if progress is not None:
                        progress(done, total)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        config = source.config.to_json(str(dtype).removeprefix("torch."))
        for name, text in (files | {"config.json": config}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        # Once more, in case somebody put something there meanwhile.
        targets.check_folder(folder, names, overwrite=overwrite, shards=True, source=source.path)


def _targets(source: GGUFSource) -> Iterator[_Target]:
    """Every tensor of the per-expert layout, in the order of the parameters."""
    for parameter, shape in parameter_shapes(source.config).items():
        if parameter.endswith(GATE_UP):
            prefix, (experts, both, width) = parameter.removesuffix(".gate_up_proj"), shape
            for e in range(experts):
                half = both // 2
                for part, row in (("gate", 0), ("up", half)):
                    yield _Target(f"{prefix}.{e}.{part}_proj.weight", (half, width), parameter, e, row)
        elif parameter.endswith(DOWN):
            for e in range(shape[0]):
                yield _Target(f"{parameter.removesuffix('.down_proj')}.{e}.down_proj.weight", shape[1:], parameter, e)
        else:
            yield _Target(parameter, shape, parameter)


def _shards(targets: list[_Target], item_bytes: int, limit: int) -> list[list[_Target]]:
    shards: list[list[_Target]] = [[]]
    used = 0
    for target in targets:
        size = _size(target, item_bytes)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(target)
        used += size
    return shards


def _size(target: _Target, item_bytes: int) -> int:
    return torch.Size(target.shape).numel() * item_bytes


def _converted(target: _Target, value: Tensor, dtype: torch.dtype) -> Tensor:
    part = value[target.first_row : target.first_row + target.shape[0]].to(dtype)
    if not all_finite(part):
        raise CheckpointError(
            f"Tensor {shown(target.name)} has values that are not finite or too large for "
            f"{str(dtype).removeprefix('torch.')}; convert with --type bf16, or fetch the file again."
        )
    return part
