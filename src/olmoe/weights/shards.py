"""Weights in several files: how they are split, named and indexed, as in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from olmoe.io.tensor_file import INDEX_NAME, SINGLE_NAME

MAX_SHARD_BYTES = 4 * 10**9


def cut(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in their order: each file at most `limit` bytes, or a single larger tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)
    }


def write_index(folder: Path, shards: Mapping[str, list[str]], total: int) -> None:
    """Write the index for the shards from `cut`, which hold `total` bytes; a single file needs none."""
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
