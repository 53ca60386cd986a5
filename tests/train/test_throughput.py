"""Model FLOPs, the peak rate that they are compared with, and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configurations import small_config
from olmoe.config import ModelConfig
from olmoe.runtime import peak_memory_bytes
from olmoe.train import throughput
from olmoe.train.ranks import Ranks
from olmoe.train.throughput import Throughput, flops_per_token, product_rate

CPU = torch.device("cpu")
TINY = ModelConfig(
    vocab_size=4096, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_experts=64,
    num_experts_per_tok=8, max_position_embeddings=512,
)  # fmt: skip


def test_flops_count_the_matrix_products():
    attention, routers, experts, head = 4 * 4 * 128 * 128, 4 * 64 * 128, 4 * 8 * 3 * 128 * 64, 4096 * 128
    norms = 4 * 4 * 128 + 128
    assert flops_per_token(TINY) == 6 * (attention + routers + experts + head + norms)
    assert flops_per_token(TINY) == pytest.approx(9.6e6, rel=0.01)
    assert flops_per_token(replace(TINY, tie_word_embeddings=True)) == flops_per_token(TINY)  # counted as the head
    assert flops_per_token(replace(TINY, num_experts=128)) - flops_per_token(TINY) == 6 * routers  # not of all experts


def test_mfu_is_a_fraction_of_the_peak_of_all_devices():
    class Two(Ranks):
        """The second of two equal ranks, the first of which reports twice the memory."""

        def sum(self, values):
            if values.ndim == 0:
                return values * 2
            assert values[0].tolist() == [0]
            return values + torch.tensor([[2], [0]]) * values[1]

    found = Throughput.of(TINY, CPU, 1e9, Two(rank=1, size=2)).values(tokens=1000, seconds=4.0)
    assert found["tokens_per_second"] == 250
    assert found["peak_flops"] == 2e9
    assert found["mfu"] == pytest.approx(250 * flops_per_token(TINY) / 2e9)
    assert 2**27 < found["peak_memory_bytes"] <= 2 * peak_memory_bytes()
    alone = Throughput.of(TINY, CPU, 1e9).values(tokens=1000, seconds=4.0)
    assert alone["mfu"] == pytest.approx(2 * found["mfu"])
    assert 2**26 < alone["peak_memory_bytes"] <= peak_memory_bytes()


def test_the_peak_rate_is_measured_unless_given(monkeypatch):
    """With a fake clock on which products take the time of a 100 GFLOP/s device plus a millisecond of start-up."""
    now, sizes = [0.0], []

    def product(a, b):
        sizes.append(len(a))
        now[0] += 2 * len(a) ** 3 / 1e11 + 1e-3

    monkeypatch.setattr(throughput.torch, "mm", product)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    assert Throughput.of(small_config(), CPU, None).peak_flops == pytest.approx(1e11, rel=0.05)
    assert sizes == [512] * 3 + [1024] * 3  # the first product is too short for a good estimate


def test_the_peak_rate_of_this_machine_is_plausible():
    assert 1e8 < product_rate(CPU) < 1e15
