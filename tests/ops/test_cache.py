"""The int8 cache: torch and the kernels write the same bytes and attend to it equally up to rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from olmoe.ops import cpu
from olmoe.ops.cache import BlockCache, position_bytes, quantize_rows
from olmoe.ops.cpu.functional import block_attention
from olmoe.runner import Batch, CacheView
from olmoe.runner.torch_runner import BlockAttend
from ops.tolerances import forward_tolerance

needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")
KV_HEADS = 2


@pytest.fixture(params=cpu.isas() if cpu.available() else [])
def isa(request):
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def allocate(blocks, block_size, head_dim, layers=1, kv_heads=KV_HEADS):
    """A cache filled with NaN."""
    cache = BlockCache.allocate(
        layers, blocks, kv_heads, block_size, head_dim, dtype=torch.int8, device=torch.device("cpu")
    )
    for t in (*cache.keys, *cache.values):
        t.fill_(77)
    for t in (*cache.key_scales, *cache.value_scales):
        t.fill_(math.nan)
    return cache


def table(blocks, sequences=1):
    return np.random.default_rng(1).permutation(blocks).astype(np.int32).reshape(sequences, -1)


def rows(*shape, seed=0):
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()


def test_int8_rows_are_rounded_to_the_nearest_code():
    x = rows(500, 24)
    codes, scales = quantize_rows(x)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert torch.equal(codes.abs().amax(-1), torch.full((500,), 127, dtype=torch.int8))
    assert torch.equal(scales, x.abs().amax(-1) / 127)
    assert ((codes * scales.unsqueeze(-1) - x).abs() <= 0.5001 * scales.unsqueeze(-1)).all()


def test_halves_round_to_even():
    codes, scales = quantize_rows(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]))
    assert scales == 1
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


def test_zeros_stay_zero_and_tiny_values_do_not_overflow():
    codes, scales = quantize_rows(torch.tensor([[0.0, -0.0], [1e-40, 0.0]]))
    assert not codes.any()
    assert scales.isfinite().all()


@pytest.mark.parametrize("foreign", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_visible(foreign):
    codes, scales = quantize_rows(torch.tensor([1.0, foreign, 2.0]))
    assert (codes * scales).isnan().all()


@pytest.mark.parametrize(
    ("block_size", "head_dim", "reason"),
    [
        (64, 128, "the engine's"),
        (11, 6, "a sequence of any length"),
        (1, 2, "the least"),
        (3, 2, "bytes of no whole fp32"),
    ],
)
@pytest.mark.parametrize("blocks", [1, 6])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_reading_returns_what_was_written(block_size, head_dim, reason, blocks, kv_heads):
    cache = allocate(blocks, block_size, head_dim, layers=2, kv_heads=kv_heads)
    order, length = table(blocks), blocks * block_size
    k, v = rows(2, length, kv_heads, head_dim), rows(2, length, kv_heads, head_dim, seed=1)
    for start in range(0, length, 5):
        for layer in range(2):
            cache.write(layer, order[0], start, k[layer, start : start + 5], v[layer, start : start + 5])
    for layer in range(2):
        for seen in (length, length - length // 3):
            for read, written in zip(cache.read(layer, order, seen), (k, v), strict=True):
                codes, scales = quantize_rows(written[layer, :seen])
                assert torch.equal(read[0], (codes * scales.unsqueeze(-1)).transpose(0, 1))


def test_memory_is_as_reported():
    assert position_bytes(16, 16, 128, torch.int8) == 2 * 16 * 16 * (128 + 4)
    assert position_bytes(16, 16, 128, torch.float16) == 2 * 16 * 16 * 128 * 2
    cache = allocate(3, 64, 128, layers=2)
    assert cache.keys[0].untyped_storage().nbytes() == 3 * 64 * position_bytes(2, KV_HEADS, 128, torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_block_is_copied_up_to_a_position(dtype):
    cache = BlockCache.allocate(2, 4, KV_HEADS, 64, 24, dtype=dtype, device=torch.device("cpu"))
    for t in (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales):
        t.fill_(1)
        t[3] = torch.arange(t[3].numel()).view(t[3].shape) % 100
    cache.copy(3, 1, 37)
    for t in (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales):
        assert torch.equal(t[1, :, :37], t[3, :, :37])
        assert (t[1, :, 37:] == 1).all()
        assert (t[[0, 2]] == 1).all()


def attended(kind, q, k, v, cache, order, counts, lengths):
    if kind == "torch":
        return BlockAttend(Batch([0] * len(q), counts, lengths), CacheView(cache, order))(q, k, v, 0)
    return block_attention(q, k, v, counts, lengths, cache, order, 0)


# 24 leaves a remainder after full vectors; 6 is shorter than any vector.
@needs_kernels
@pytest.mark.parametrize("head_dim", [128, 24, 6])
@pytest.mark.parametrize("block_size", [64, 192])
@pytest.mark.parametrize("heads", [2, 6])
def test_kernels_write_and_attend_like_torch(isa, head_dim, block_size, heads):
    width = -(-170 // block_size)
    order = table(2 * width, 2)
    caches = {kind: allocate(2 * width, block_size, head_dim) for kind in ("cpu", "torch")}
    lengths = [0, 0]
    for step, counts in enumerate([[130, 64], [1, 1], [30, 5], [1, 1]]):
        n = sum(counts)
        q, k, v = (rows(n, h, head_dim, seed=3 * step + i) for i, h in enumerate((heads, KV_HEADS, KV_HEADS)))
        # Scores that keep more than one key in the softmax.
        q, k = q / q.norm(dim=-1, keepdim=True) * 2, k / k.norm(dim=-1, keepdim=True) * 3
        ours, theirs = (attended(kind, q, k, v, caches[kind], order, counts, lengths) for kind in ("cpu", "torch"))
        largest = theirs.abs().max()
        assert (ours - theirs).abs().max() <= forward_tolerance("cached_attention", torch.float32) * largest
        lengths = [a + b for a, b in zip(lengths, counts, strict=True)]
    for name in ("keys", "values"):
        assert torch.equal(*(getattr(caches[kind], name)[0] for kind in ("cpu", "torch")))
    for name in ("key_scales", "value_scales"):
        ours, theirs = (getattr(caches[kind], name)[0] for kind in ("cpu", "torch"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("foreign", [math.nan, math.inf])
def test_nan_and_infinity_stay_visible_in_the_kernels(isa, foreign):
    for place in ("k", "v"):
        inputs = {"q": rows(3, 2, 24), "k": rows(3, 2, 24, seed=1), "v": rows(3, 2, 24, seed=2)}
        inputs[place][1, 0, 5] = foreign
        out = block_attention(*inputs.values(), [3], [0], allocate(1, 64, 24), table(1), 0)
        assert out[0].isfinite().all()
        assert out[1:, 0].isnan().all()
        assert out[:, 1].isfinite().all()
