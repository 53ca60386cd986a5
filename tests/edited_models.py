"""Edited checkpoints for tests, and what models make of ids by each way to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configurations import VOCAB_SIZE
from olmoe.runner import Batch, CacheView, RouterTrace, Want, make_runner
from olmoe.runner.base import ResolvedPolicy
from olmoe.weights import checkpoint
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.edited import EditedSource, write

IDS = torch.randint(2, VOCAB_SIZE - 1, (40,), generator=torch.Generator().manual_seed(3)).tolist()
LOAD = [[0.1, 0.5, 0.2, 0.05, 0.4, 0.3, 0.6, 0.85], [0.8, 0.2, 0.4, 0.3, 0.1, 0.6, 0.5, 0.1]]


def every_edit(start: Blueprint) -> dict[str, Blueprint]:
    """One blueprint of each kind for a model of two layers of eight experts, and one of all together."""
    pruned = start.without([[1, 6], [0, 7]])
    merged = start.merged([[[0, 3, 5]], [[2, 7], [1, 6]]], LOAD)
    order = [[3, 0, 7, 1, 6, 2, 5, 4], [7, 6, 5, 4, 0, 1, 2, 3]]
    together = start.without([[1], [0]]).merged([[[0, 3]], [[1, 5]]], LOAD).reordered([[5, 4, 3, 2, 1, 0]] * 2)
    return {
        "pruned": pruned,
        "merged": merged,
        "reordered": start.reordered(order),
        "duplicated": start.with_copies([0]),
        "top_k": start.with_routing(2),
        "normalized": start.with_routing(normalize_top_k=True),
        "together": together.with_copies([1]).with_routing(4, True),
    }


def edited_folder(folder: Path, target: Path, blueprint: Blueprint, **options: Any) -> Path:
    """The checkpoint in `folder` edited to `target`."""
    write(EditedSource(open_source(folder), blueprint), target, **options)
    return target


def run(
    folder: Path, backend: str = "cpu", policy: ResolvedPolicy | None = None, ids: list[int] = IDS, **options: Any
) -> tuple[Tensor, RouterTrace]:
    """Logits (N, V) and the routing of ids; `options` are those of loading."""
    runner = make_runner(checkpoint.load(folder, **options), backend)
    blocks = runner.new_cache(1, len(ids))
    view = CacheView(blocks, np.arange(blocks.blocks, dtype=np.int32)[None])
    rows = range(len(ids))
    out = runner.forward(Batch(ids, [len(ids)], [0], [len(ids)], [policy]), view, Want(rows, rows))
    assert out.trace is not None
    return out.logits, out.trace
