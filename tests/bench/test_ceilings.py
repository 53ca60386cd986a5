"""What a step must read, and how fast memory delivers it."""

from __future__ import annotations

import pytest
import torch

from olmoe.bench import ceilings
from olmoe.bench.ceilings import Ceiling, StepBytes, step_bytes
from olmoe.bench.random_models import skeleton
from olmoe.config import ModelConfig
from olmoe.ops.cpu import extension


def test_a_step_reads_what_the_formats_take():
    config = ModelConfig()  # the released one
    model = skeleton(config, "bf16")
    step = step_bytes(model, 100)
    # All active parameters but the embeddings, of which one row is read.
    assert step.weights == 2 * (config.num_active_parameters - config.vocab_size * config.hidden_size)
    assert step.cache == 100 * 16 * 2 * 2048 * 2
    four = step_bytes(skeleton(config, "q4_0"), 100)
    assert four.weights / (step.weights / 2) == pytest.approx(4.5 / 8, rel=0.02)
    assert four.cache == step.cache  # fp16
    assert step_bytes(model, 100, cache_dtype=torch.float32).cache == 2 * step.cache
    assert step_bytes(model, 100, cache_dtype=torch.int8).cache == 100 * 16 * 2 * 16 * (128 + 4)


def test_a_batch_shares_the_dense_weights_and_some_experts():
    model = skeleton(ModelConfig(), "bf16")
    one, eight, many = (step_bytes(model, 10, batch).weights for batch in (1, 8, 10_000))
    assert one < eight < 8 * one
    config = model.config
    assert many == 2 * (config.num_parameters - config.vocab_size * config.hidden_size)
    assert step_bytes(model, 10, 8).cache == 8 * step_bytes(model, 10).cache


def test_the_ceiling_is_bandwidth_over_bytes():
    ceiling = Ceiling(2e9, StepBytes(900_000_000, 100_000_000), 4)
    assert ceiling.tokens_per_second == 8.0
    assert ceiling.to_dict()["read_gb_per_s"] == 2.0
    assert ceiling.to_dict()["decode_tokens_per_s"] == 8.0


def test_bandwidth_is_measured_with_and_without_the_kernels(monkeypatch):
    assert 1e6 < ceilings.read_bandwidth(1, 2**22) < 1e14
    monkeypatch.setattr(extension, "_load", lambda: (None, "there are none"))
    assert 1e6 < ceilings.read_bandwidth(1, 2**22) < 1e14
