"""Keys and values of sequences in blocks: the only Python class that knows their layout (csrc/core/cache.h in C++).

A block holds `block_size` positions of one sequence for all KV heads, and a row of an int32 table says which blocks a
sequence has, in the order of its positions. Sequences join and leave without a copy. A contiguous cache is the case of
one block per sequence.

An int8 cache holds each row of Dh numbers as signed bytes with its own fp32 scale: half the memory of fp16, and a
row's numbers depend on nothing but the row.

Shapes legend: B sequences, G KV heads, S positions, Dh head dim, W blocks in a row of the table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olmoe.errors import UserError
from olmoe.ops.cpu import extension
from olmoe.runtime import advise_large_pages

Table = npt.NDArray[np.int32]
# Keys that the kernels process together, and therefore the block size that costs them nothing.
KEY_BLOCK = 64


@functools.cache
def one_block_each(batch: int) -> Table:
    """The table (B, 1) of a cache whose block b is all of sequence b."""
    table = np.arange(batch, dtype=np.int32)[:, None]
    table.setflags(write=False)
    return table


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., Dh) as int8 codes, to the nearest and halves to even, and their fp32 scales (...) of max|x| / 127.

    A row with numbers that are not finite has codes of 0 and a scale that turns them into NaN.
    """
    wide = x.float()
    scales = wide.abs().amax(dim=-1) / 127
    inverses = 1 / scales
    inverses = torch.where(inverses.isfinite(), inverses, 0.0).unsqueeze(-1)
    codes = torch.where(scales.isfinite().unsqueeze(-1), (wide * inverses).round(), 0.0)
    return codes.to(torch.int8), scales


def position_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a cache of `dtype`, scales included."""
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * layers * kv_heads * (head_dim * dtype.itemsize + scale)


def _strides(cached: Tensor) -> tuple[int, ...]:
    """Numbers from a block of (blocks, G, block_size, ...) to the next, and from a head of it to the next."""
    if cached.is_contiguous():  # for dimensions of size one, torch's strides are arbitrary
        head = math.prod(cached.shape[2:])
        return cached.shape[1] * head, head
    assert cached[:1, :1].is_contiguous()
    return cached.stride()[:2]


class BlockCache:
    """Keys and values of all layers, each (blocks, G, block_size, Dh); its tensors are written in place.

    One of int8 also has `key_scales` and `value_scales`, each (blocks, G, block_size) fp32; others have none.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        key_scales: Sequence[Tensor] = (),
        value_scales: Sequence[Tensor] = (),
    ) -> None:
        """A cache in existing tensors, all alike, and contiguous within a block and a head."""
        self.keys, self.values = list(keys), list(values)
        self.key_scales, self.value_scales = list(key_scales), list(value_scales)
        first = self.keys[0]
        self.dtype, self.device = first.dtype, first.device
        self.blocks, self.kv_heads, self.block_size, self.head_dim = first.shape
        self._strides = _strides(first)
        assert len(self.keys) == len(self.values)
        assert all(
            t.shape == first.shape and t.dtype == first.dtype and _strides(t) == self._strides
            for t in (*self.keys, *self.values)
        )
        assert len(self.key_scales) == len(self.value_scales) == (len(self.keys) if first.dtype == torch.int8 else 0)
        places = set()  # of scales behind their codes
        for scales, codes in zip(self.key_scales + self.value_scales, self.keys + self.values, strict=False):
            assert (scales.shape, scales.dtype) == (first.shape[:3], torch.float32)
            assert all(
                size == 1 or 4 * ours == theirs
                for size, ours, theirs in zip(first.shape[:2], _strides(scales), self._strides, strict=True)
            )
            places.add(scales.data_ptr() - codes.data_ptr())
        assert len(places) <= 1
        self._scales_at = places.pop() if places else 0

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

        All layers share one allocation, which the system can back almost entirely with pages of 2 MB. In a block the
        values of a head follow its keys, and scales follow what they belong to: wherever memory is not read in order,
        what the processor has prefetched is wasted. Raises `UserError` if there is not enough memory.
        """
        numbers = block_size * head_dim
        part = -(-numbers // 4) * 4 + 4 * block_size if dtype == torch.int8 else numbers  # scales at whole fp32
        shape = (layers, blocks, kv_heads, 2, part)
        try:
            memory = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError:  # torch's only error for it, even on a GPU
            mib = math.prod(shape) * dtype.itemsize / 2**20
            raise UserError(
                f"There is no memory for a cache of {mib:.0f} MiB for keys and values; ask for a smaller one with "
                "--cache-mib (in Python, cache_bytes)."
            ) from None
        if device.type == "cpu":
            advise_large_pages(memory.data_ptr(), memory.numel() * memory.element_size())
        rows = memory[..., :numbers].unflatten(-1, (block_size, head_dim))
        found = [rows.select(3, i).unbind() for i in (0, 1)]
        if dtype == torch.int8:
            scales = memory[..., part - 4 * block_size :].view(torch.float32)
            found += [scales.select(3, i).unbind() for i in (0, 1)]
        return cls(*found)

    @functools.cached_property
    def kernel(self) -> Any:
        """The kernels' view."""
        return extension.kernels().CacheView(
            [t.data_ptr() for t in self.keys],
            [t.data_ptr() for t in self.values],
            extension.CACHE_TYPES[self.dtype],
            self.kv_heads,
            self.head_dim,
            self.block_size,
            *(n * self.dtype.itemsize for n in self._strides),
            self._scales_at,
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
        pairs = [(self.keys[layer], k), (self.values[layer], v)]
        if self.dtype == torch.int8:
            (codes_k, scales_k), (codes_v, scales_v) = quantize_rows(k), quantize_rows(v)
            pairs = [(self.keys[layer], codes_k), (self.key_scales[layer], scales_k)]
            pairs += [(self.values[layer], codes_v), (self.value_scales[layer], scales_v)]
        done, count = 0, len(k)
        while done < count:
            block, at = divmod(start + done, self.block_size)
            n = min(self.block_size - at, count - done)
            for cached, new in pairs:
                cached[int(row[block]), :, at : at + n] = new[done : done + n].transpose(0, 1)
            done += n

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` of one block to another, in all layers."""
        for cached in (*self.keys, *self.values, *self.key_scales, *self.value_scales):
            cached[target, :, :positions].copy_(cached[source, :, :positions])

    def read(self, layer: int, table: Table, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, length, Dh) of each row of the table; views if they are contiguous.

        Those of an int8 cache are fp32.
        """
        keys, values = (self._read(t[layer], table, length) for t in (self.keys, self.values))
        if self.dtype == torch.int8:
            key_scales, value_scales = (
                self._read(t[layer], table, length).unsqueeze(-1) for t in (self.key_scales, self.value_scales)
            )
            return keys * key_scales, values * value_scales
        return keys, values

    def _read(self, cached: Tensor, table: Table, length: int) -> Tensor:
        """Of a tensor (blocks, G, block_size, ...): (B, G, length, ...)."""
        width = -(-length // self.block_size)
        ids = table[:, :width]
        first = int(ids[0, 0])
        if width == 1 and np.array_equal(ids[:, 0], np.arange(first, first + len(ids))):
            return cached[first : first + len(ids), :, :length]
        index = torch.from_numpy(ids.reshape(-1).astype(np.int64)).to(cached.device)
        blocks = cached[index].unflatten(0, (len(ids), width))  # (B, W, G, block_size, ...)
        return blocks.transpose(1, 2).flatten(2, 3)[:, :, :length]
