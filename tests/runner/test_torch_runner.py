"""Attention over a cache in blocks, by the kernels and by torch, against attention written out position by position.

Places that were never written are poisoned.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from configurations import small_config
from olmoe.ops import cpu
from olmoe.ops.cache import BlockCache
from olmoe.ops.cpu.functional import block_attention
from olmoe.runner import Batch, CacheView
from olmoe.runner.torch_runner import BlockAttend

kernels = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}"))
backends = pytest.mark.parametrize("backend", [kernels, "torch"])


class Cache:
    """Sequences in a cache whose every place holds NaN: reading one that was never written shows."""

    def __init__(self, config, batch, capacity, dtype=torch.float32, backend="cpu", block_size=None) -> None:
        """`block_size` None: one block a sequence."""
        size = block_size or capacity
        width = -(-capacity // size)
        self.blocks = BlockCache.allocate(
            config.num_hidden_layers, batch * width, config.kv_heads, size, config.head_dim, dtype=dtype,
            device=torch.device("cpu"),
        )  # fmt: skip
        for t in (*self.blocks.keys, *self.blocks.values):
            t.fill_(77 if dtype == torch.int8 else math.nan)
        for t in (*self.blocks.key_scales, *self.blocks.value_scales):
            t.fill_(math.nan)
        order = np.arange(batch) if block_size is None else np.random.default_rng(0).permutation(batch * width)
        self.table = order.astype(np.int32).reshape(batch, width)
        self.lengths, self._backend = [0] * batch, backend

    def attend(self, counts):
        """Attention of `counts` new tokens of each sequence: q, k, v, layer -> out."""
        if self._backend == "torch":
            return BlockAttend(Batch([0] * sum(counts), counts, self.lengths), CacheView(self.blocks, self.table))
        return lambda q, k, v, layer: block_attention(q, k, v, counts, self.lengths, self.blocks, self.table, layer)

    def advance(self, counts):
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]

    def keep(self, rows):
        self.table, self.lengths = self.table[rows], [self.lengths[row] for row in rows]


def attention_by_hand(q_HD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> Tensor:
    """One query over all the given keys; head h reads KV head h // (H / G)."""
    heads, group = q_HD.shape[0], q_HD.shape[0] // k_SGD.shape[1]
    out = []
    for h in range(heads):
        weights = (k_SGD[:, h // group] @ q_HD[h] / q_HD.shape[1] ** 0.5).softmax(0)
        out.append(weights @ v_SGD[:, h // group])
    return torch.stack(out)


class Sequences:
    """Random q, k, v of several sequences, and what each position's attention must give."""

    def __init__(self, config, lengths: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = {"q": config.num_attention_heads, "k": config.kv_heads, "v": config.kv_heads}
        self.parts = [
            [{n: torch.randn(length, h, config.head_dim, generator=generator) for n, h in shape.items()}
             for length in lengths]
            for _ in range(config.num_hidden_layers)
        ]  # fmt: skip

    def prompt(self, layer: int, lengths: list[int]) -> list[Tensor]:
        rows = [{n: t[:length] for n, t in s.items()} for s, length in zip(self.parts[layer], lengths, strict=True)]
        return [torch.cat([row[n] for row in rows]) for n in "qkv"]

    def step(self, layer: int, rows: list[int], places: list[int]) -> list[Tensor]:
        return [torch.stack([self.parts[layer][r][n][p] for r, p in zip(rows, places, strict=True)]) for n in "qkv"]

    def expected(self, layer: int, row: int, place: int) -> Tensor:
        s = self.parts[layer][row]
        return attention_by_hand(s["q"][place], s["k"][: place + 1], s["v"][: place + 1])


@backends
@pytest.mark.parametrize("block_size", [None, 64], ids=["contiguous", "blocks"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[5], [3, 3], [4, 1, 7], [70, 2], [130, 64, 61]], ids=str)
def test_prefill_and_decode_see_exactly_what_came_before(kv_heads, lengths, block_size, backend):
    config = small_config(num_key_value_heads=kv_heads)
    steps = 4
    sequences = Sequences(config, [length + steps for length in lengths])
    cache = Cache(config, len(lengths), max(lengths) + steps, backend=backend, block_size=block_size)

    attend = cache.attend(lengths)
    for layer in range(config.num_hidden_layers):
        out = attend(*sequences.prompt(layer, lengths), layer)
        expected = [sequences.expected(layer, r, p) for r, length in enumerate(lengths) for p in range(length)]
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6)
    cache.advance(lengths)

    for step in range(steps):
        places = [length + step for length in lengths]
        assert cache.lengths == places
        for layer in range(config.num_hidden_layers):
            out = cache.attend([1] * len(lengths))(*sequences.step(layer, list(range(len(lengths))), places), layer)
            expected = [sequences.expected(layer, r, p) for r, p in enumerate(places)]
            torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6)
        cache.advance([1] * len(lengths))


@backends
@pytest.mark.parametrize("block_size", [None, 64], ids=["contiguous", "blocks"])
@pytest.mark.parametrize("rows", [[0, 2], [2, 0], [1], [2, 1, 0], [0, 1, 2]], ids=str)
def test_rows_of_the_table_drop_and_reorder_sequences(rows, block_size, backend):
    config = small_config(num_key_value_heads=2)
    lengths = [4, 1, 7]
    sequences = Sequences(config, [length + 2 for length in lengths])
    cache = Cache(config, 3, 9, backend=backend, block_size=block_size)
    attend = cache.attend(lengths)
    for layer in range(config.num_hidden_layers):
        attend(*sequences.prompt(layer, lengths), layer)
    cache.advance(lengths)
    cache.keep(rows)
    for step in range(2):
        places = [lengths[row] + step for row in rows]
        assert cache.lengths == places
        for layer in range(config.num_hidden_layers):
            out = cache.attend([1] * len(rows))(*sequences.step(layer, rows, places), layer)
            expected = [sequences.expected(layer, r, p) for r, p in zip(rows, places, strict=True)]
            torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6)
        cache.advance([1] * len(rows))


@backends
def test_prompts_of_a_batch_do_not_see_each_other(backend):
    config = small_config()
    sequences = Sequences(config, [3, 4])
    q, k, v = sequences.prompt(0, [3, 4])
    out = Cache(config, 2, 4, backend=backend).attend([3, 4])(q, k, v, 0)
    k[3:], v[3:] = 100.0, -100.0  # another second prompt
    changed = Cache(config, 2, 4, backend=backend).attend([3, 4])(q, k, v, 0)
    assert torch.equal(out[:3], changed[:3])
    assert not torch.allclose(out[3:], changed[3:])


@backends
def test_the_cache_has_the_dtype_and_the_size_that_were_asked_for(backend):
    config = small_config(num_key_value_heads=2)
    cache = Cache(config, 2, 11, torch.bfloat16, backend)
    assert len(cache.blocks.keys) == len(cache.blocks.values) == config.num_hidden_layers
    assert all(t.shape == (2, 2, 11, config.head_dim) for t in (*cache.blocks.keys, *cache.blocks.values))
    q, k, v = (t.bfloat16() for t in Sequences(config, [3, 2]).prompt(0, [3, 2]))
    assert cache.attend([3, 2])(q, k, v, 0).dtype == torch.bfloat16


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache of `dtype` holds of rows (..., Dh)."""
    if dtype != torch.int8:
        return x.to(dtype).float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


@backends
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_another_dtype_than_its_queries_rounds_keys_and_values_alone(dtype, cache_dtype, backend):
    config = small_config(num_key_value_heads=2)
    sequences = Sequences(config, [6, 4])
    for part in sequences.parts[0]:
        for name in part:
            part[name] = part[name].to(dtype).float()
    cache = Cache(config, 2, 8, cache_dtype, backend)
    cache.attend([5, 3])(*(t.to(dtype) for t in sequences.prompt(0, [5, 3])), 0)
    cache.advance([5, 3])
    out = cache.attend([1, 1])(*(t.to(dtype) for t in sequences.step(0, [0, 1], [5, 3])), 0)
    assert out.dtype == dtype
    for part in sequences.parts[0]:
        part["k"], part["v"] = (rounded(part[name], cache_dtype) for name in "kv")
    expected = torch.stack([sequences.expected(0, 0, 5), sequences.expected(0, 1, 3)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")
def test_the_kernels_attend_in_a_batch_as_alone():
    """Bit for bit, which torch's masked attention does not promise."""
    config = small_config()
    sequences, lengths = Sequences(config, [90, 3, 20]), [89, 2, 19]

    def decoded(rows):
        cache = Cache(config, len(rows), 90)
        prompts = [sequences.prompt(0, lengths)[i].split(lengths) for i in range(3)]
        cache.attend([lengths[r] for r in rows])(*(torch.cat([p[r] for r in rows]) for p in prompts), 0)
        cache.advance([lengths[r] for r in rows])
        return cache.attend([1] * len(rows))(*sequences.step(0, rows, [lengths[r] for r in rows]), 0)

    assert torch.equal(decoded([0, 1, 2]), torch.cat([decoded([r]) for r in range(3)]))
