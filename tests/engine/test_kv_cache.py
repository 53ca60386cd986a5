"""The contiguous cache against attention written out position by position, with unwritten places poisoned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from configurations import small_config
from olmoe.engine.kv_cache import KVCache


def poisoned(config, batch: int, capacity: int, dtype=torch.float32) -> KVCache:
    """A cache whose every place holds NaN: reading one that was never written shows."""
    cache = KVCache(config, batch, capacity, dtype=dtype, device=torch.device("cpu"))
    for t in (*cache._keys, *cache._values):
        t.fill_(math.nan)
    return cache


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


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[5], [3, 3], [4, 1, 7]], ids=str)
def test_prefill_and_decode_see_exactly_what_came_before(kv_heads, lengths):
    config = small_config(num_key_value_heads=kv_heads)
    steps = 4
    sequences = Sequences(config, [length + steps for length in lengths])
    cache = poisoned(config, len(lengths), max(lengths) + steps)

    attend = cache.attend_prefill(lengths)
    for layer in range(config.num_hidden_layers):
        out = attend(*sequences.prompt(layer, lengths), layer)
        expected = [sequences.expected(layer, r, p) for r, length in enumerate(lengths) for p in range(length)]
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6)
    cache.advance(lengths)

    for step in range(steps):
        places = [length + step for length in lengths]
        assert cache.lengths == places
        cache.start_decode()
        for layer in range(config.num_hidden_layers):
            out = cache.attend_decode(*sequences.step(layer, list(range(len(lengths))), places), layer)
            expected = [sequences.expected(layer, r, p) for r, p in enumerate(places)]
            torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6)
        cache.advance([1] * len(lengths))


@pytest.mark.parametrize("rows", [[0, 2], [2, 0], [1], [2, 1, 0], [0, 1, 2]], ids=str)
def test_keep_drops_and_reorders_sequences(rows):
    config = small_config(num_key_value_heads=2)
    lengths = [4, 1, 7]
    sequences = Sequences(config, [length + 2 for length in lengths])
    cache = poisoned(config, 3, 9)
    attend = cache.attend_prefill(lengths)
    for layer in range(config.num_hidden_layers):
        attend(*sequences.prompt(layer, lengths), layer)
    cache.advance(lengths)
    cache.start_decode()  # a mask of three rows, which must not outlive `keep`
    cache.keep(rows)
    for step in range(2):
        places = [lengths[row] + step for row in rows]
        assert cache.lengths == places
        cache.start_decode()
        for layer in range(config.num_hidden_layers):
            out = cache.attend_decode(*sequences.step(layer, rows, places), layer)
            expected = [sequences.expected(layer, r, p) for r, p in zip(rows, places, strict=True)]
            torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6)
        cache.advance([1] * len(rows))


def test_prompts_of_a_batch_do_not_see_each_other():
    config = small_config()
    sequences = Sequences(config, [3, 4])
    q, k, v = sequences.prompt(0, [3, 4])
    out = poisoned(config, 2, 4).attend_prefill([3, 4])(q, k, v, 0)
    k[3:], v[3:] = 100.0, -100.0  # another second prompt
    changed = poisoned(config, 2, 4).attend_prefill([3, 4])(q, k, v, 0)
    assert torch.equal(out[:3], changed[:3])
    assert not torch.allclose(out[3:], changed[3:])


def test_the_cache_has_the_dtype_and_the_size_that_were_asked_for():
    config = small_config(num_key_value_heads=2)
    cache = poisoned(config, 2, 11, torch.bfloat16)
    assert len(cache._keys) == len(cache._values) == config.num_hidden_layers
    assert all(t.shape == (2, 2, 11, config.head_dim) for t in (*cache._keys, *cache._values))
    q, k, v = (t.bfloat16() for t in Sequences(config, [3, 2]).prompt(0, [3, 2]))
    assert cache.attend_prefill([3, 2])(q, k, v, 0).dtype == torch.bfloat16
