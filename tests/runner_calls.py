"""Sequences through a runner: whole, in chunks, in batches, in blocks anywhere in a cache."""

from __future__ import annotations

import numpy as np
import torch

from olmoe.runner import Batch, CacheView, Want

VOCABULARY = 320
BLOCK = 64  # positions of a block: the least that the kernels take


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def tables(cache, sequences):
    """A table of blocks anywhere in the cache, all of them in use."""
    order = np.random.default_rng(3).permutation(cache.blocks).astype(np.int32)
    return order.reshape(sequences, -1)


def chunked(runner, ids, sizes, policy=None):
    """The logits of the last token of `ids`, which go through in chunks of `sizes`."""
    cache, start = runner.new_cache(1, len(ids), block_size=BLOCK), 0
    table = tables(cache, 1)
    for size in sizes:
        batch = Batch(ids[start : start + size], [size], [start], [len(ids)], [policy])
        out = runner.forward(batch, CacheView(cache, table), Want([size - 1]))
        start += size
    return out.logits[0]


def together(runner, prompts, steps=2, policies=None):
    """Logits after prompts that go through together, and after each of some steps: [(B, V)]."""
    count = len(prompts)
    cache = runner.new_cache(count, max(map(len, prompts)) + steps, block_size=BLOCK)
    view = CacheView(cache, tables(cache, count))
    lengths = [len(p) for p in prompts]
    batch = Batch([i for p in prompts for i in p], lengths, [0] * count, policies=policies)
    outputs = [runner.forward(batch, view, Want(batch.ends())).logits]
    for step in range(steps):
        batch = Batch([17 + step] * count, [1] * count, lengths, policies=policies)
        outputs.append(runner.forward(batch, view, Want(batch.ends())).logits)
        lengths = [n + 1 for n in lengths]
    return outputs


def error(ours, theirs):
    """The largest difference, as a share of the largest value."""
    assert torch.isfinite(ours).all()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
