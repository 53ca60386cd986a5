"""Keys and values of sequences in blocks: the one class in Python that knows how they lie (csrc/core/cache.h in C++).

A block holds `block_size` positions of one sequence for all KV heads, and a row of an int32 table says which blocks a
sequence has, in the order of its positions. Sequences join and leave without a copy. A contiguous cache is the case of
one block a sequence.

Shapes legend: B sequences, G KV heads, S positions, Dh head dim, W blocks in a row of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olmoe.ops.cpu import extension
from olmoe.runtime import advise_large_pages

Table = npt.NDArray[np.int32]
# Keys that the kernels look at together, and so the size of blocks that costs them nothing.
KEY_BLOCK = 64


@functools.cache
def one_block_each(batch: int) -> Table:
    """The table (B, 1) of a cache whose block b is all of sequence b."""
    table = np.arange(batch, dtype=np.int32)[:, None]
    table.setflags(write=False)
    return table


class BlockCache:
    """Keys and values of all layers, each (blocks, G, block_size, Dh); its tensors are written in place."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """A cache in tensors that exist, contiguous and alike."""
        self.keys, self.values = list(keys), list(values)
        first = self.keys[0]
        self.dtype, self.device = first.dtype, first.device
        self.blocks, self.kv_heads, self.block_size, self.head_dim = first.shape
        assert len(self.keys) == len(self.values)
        assert all(
            t.shape == first.shape and t.dtype == first.dtype and t.is_contiguous() for t in (*self.keys, *self.values)
        )

    @classmethod
    def allocate(
        cls,
        layers: int,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> BlockCache:
        """An empty cache; memory is taken as it is written.

        All layers share one allocation, which the system can back with pages of 2 MB nearly whole.
        """
        shape = (2 * layers, blocks, kv_heads, block_size, head_dim)
        memory = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            advise_large_pages(memory.data_ptr(), memory.numel() * memory.element_size())
        tensors = memory.unbind()
        return cls(tensors[:layers], tensors[layers:])

    @functools.cached_property
    def kernel(self) -> Any:
        """The kernels' view."""
        return extension.kernels().CacheView(
            [t.data_ptr() for t in self.keys],
            [t.data_ptr() for t in self.values],
            extension.FLOAT_TYPES[self.dtype],
            self.kv_heads,
            self.head_dim,
            self.block_size,
        )

    def check(self, table: Table, counts: Sequence[int], lengths: Sequence[int]) -> None:
        """Assert that `counts` new tokens of each sequence, after `lengths` cached ones, have slots in this cache."""
        assert len(table) == len(counts) == len(lengths)
        assert table.dtype == np.int32
        assert min(counts, default=0) >= 0
        assert min(lengths, default=0) >= 0
        longest = max(map(int.__add__, counts, lengths), default=0)
        assert longest <= table.shape[1] * self.block_size, (longest, table.shape, self.block_size)
        assert self.block_size % KEY_BLOCK == 0 or table.shape[1] <= 1
        assert table.size == 0 or 0 <= int(table.min()) <= int(table.max()) < self.blocks

    def write(self, layer: int, row: Table, start: int, k: Tensor, v: Tensor) -> None:
        """Put the keys and values (T, G, Dh) of positions `start`, `start` + 1, ... of a sequence into its blocks."""
        done, count = 0, len(k)
        while done < count:
            block, at = divmod(start + done, self.block_size)
            n = min(self.block_size - at, count - done)
            for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
                cached[int(row[block]), :, at : at + n] = new[done : done + n].transpose(0, 1)
            done += n

    def read(self, layer: int, table: Table, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, length, Dh) of each row of the table; views where they lie together."""
        width = -(-length // self.block_size)
        ids = table[:, :width]
        first = int(ids[0, 0])
        found = []
        for cached in (self.keys[layer], self.values[layer]):
            if width == 1 and np.array_equal(ids[:, 0], np.arange(first, first + len(ids))):
                found.append(cached[first : first + len(ids), :, :length])
                continue
            index = torch.from_numpy(ids.reshape(-1).astype(np.int64)).to(cached.device)
            blocks = cached[index].view(len(ids), width, self.kv_heads, self.block_size, self.head_dim)
            found.append(blocks.transpose(1, 2).flatten(2, 3)[:, :, :length])
        return found[0], found[1]
