"""One optimizer step, also when several processes share it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError
from olmoe.model import CausalLM, causal_attend, initialize
from olmoe.model.router_losses import load_balancing, router_z
from olmoe.train.config import (
    BatchConfig,
    DataConfig,
    OptimizerConfig,
    RegularizationConfig,
    RunConfig,
    ScheduleConfig,
    Source,
    TokenizerConfig,
    TrainConfig,
)
from olmoe.train.data import Mixture
from olmoe.train.optim import build_optimizer, clip_gradients
from olmoe.train.step import Scales, StepReport, accumulate, microbatches, train_step

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=61, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
    num_experts_per_tok=2, max_position_embeddings=32, eos_token_id=0,
)  # fmt: skip
CONFIG = TrainConfig(
    run=RunConfig(output="run", seed=1),
    model=MODEL,
    tokenizer=TokenizerConfig(path="tokenizer.json"),
    data=DataConfig(train=(Source(path="text"),), sequence_length=12),
    batch=BatchConfig(sequences=2, accumulation=4),
    schedule=ScheduleConfig(total_tokens=12 * 8 * 10, warmup_tokens=12 * 8 * 2),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    regularization=RegularizationConfig(residual_dropout=0.1),
)


@pytest.fixture
def model():
    model = CausalLM(MODEL)
    initialize(model, 1)
    return model


@pytest.fixture
def mixture():
    tokens = np.random.default_rng(1).integers(0, 61, 1000).astype("<u2")
    return Mixture([(tokens, 1.0)], 12, 1)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_a_step_number_determines_its_microbatches(mixture):
    batches = list(microbatches(mixture, CONFIG, 3, CPU))
    assert [batch.first for batch in batches] == [24, 26, 28, 30]
    for batch in batches:
        assert batch.windows.tolist() == [
            mixture.window(batch.first).tolist(),
            mixture.window(batch.first + 1).tolist(),
        ]


def test_repetitive_windows_are_masked_from_the_loss(model):
    """They still count in the denominator of losses and train the routers' losses."""
    tokens = np.random.default_rng(1).integers(0, 61, 1000).astype("<u2")
    tokens[100:500] = 7
    filtered = replace(CONFIG, data=replace(CONFIG.data, mask_repetitions=8), regularization=RegularizationConfig())
    batches = list(microbatches(Mixture([(tokens, 1.0)], 12, 1), filtered, 0, CPU))
    trained = [bool(flag) for batch in batches for flag in batch.trained]
    assert trained == [not (window == 7).sum() >= 8 for batch in batches for window in batch.windows]
    assert len(set(trained)) == 2
    found = StepReport()
    accumulate(model, batches, Scales.of(filtered), filtered, found)
    kept = gradients(model)
    model.zero_grad()
    loss, auxiliary = 0.0, 0.0
    for batch in batches:
        output = model(batch.windows, torch.arange(12).expand(2, 12), causal_attend)
        logits = model.logits(output.hidden[:, :-1])
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.windows[:, 1:], reduction="none")
        loss = loss + each[batch.trained].sum() / filtered.tokens_per_step
        weights = filtered.loss.load_balancing, filtered.loss.router_z
        auxiliary = (
            auxiliary + weights[0] * load_balancing(output.routers) / 4 + weights[1] * router_z(output.routers) / 4
        )
    (loss + auxiliary).backward()
    assert found.cross_entropy == pytest.approx(float(loss.detach()), rel=1e-5)
    reported = weights[0] * found.load_balancing + weights[1] * found.router_z
    assert reported == pytest.approx(float(auxiliary.detach()), rel=1e-5)
    for ours, theirs in zip(kept, gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_data_of_a_step_depends_on_seed_and_number_alone(seed):
    """Regardless of what was read before: a loader has no state that a checkpoint would have to keep."""
    random = np.random.default_rng(1)
    tokens = [random.integers(0, 5, length).astype("<u2") for length in (1000, 300)]
    config = replace(CONFIG, data=replace(CONFIG.data, document_mask=True, mask_repetitions=4))

    def opened():
        return Mixture([(tokens[0], 0.7), (tokens[1], 2.5)], 12, seed, vocab_size=5)

    def read(mixture, step):
        return [(b.first, b.windows.tolist(), b.trained.tolist()) for b in microbatches(mixture, config, step, CPU)]

    one = opened()
    in_order = [read(one, step) for step in range(40)]  # several epochs
    for step in (39, 0, 17, 16, 5):
        assert read(opened(), step) == in_order[step]
        assert read(one, step) == in_order[step]
    assert len({flag for step in in_order for _, _, flags in step for flag in flags}) == 2
    other = Mixture([(tokens[0], 0.7), (tokens[1], 2.5)], 12, seed + 1)
    assert read(other, 0) != in_order[0]


def test_two_processes_sharing_a_step_sum_to_one(model, mixture):
    batches, scales = list(microbatches(mixture, CONFIG, 0, CPU)), Scales.of(CONFIG)
    whole, shares = StepReport(), [StepReport(), StepReport()]
    accumulate(model, batches, scales, CONFIG, whole)
    expected = gradients(model)
    parts = []
    for rank, share in enumerate(shares):
        model.zero_grad()
        accumulate(model, batches[rank::2], scales, CONFIG, share)
        parts.append(gradients(model))
    for want, *got in zip(expected, *parts, strict=True):
        torch.testing.assert_close(sum(got), want, rtol=1e-4, atol=1e-7)
    for name in ("cross_entropy", "load_balancing", "router_z"):
        assert sum(getattr(share, name) for share in shares) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert torch.equal(shares[0].counts_LE + shares[1].counts_LE, whole.counts_LE)
    torch.testing.assert_close(shares[0].margins_L2 + shares[1].margins_L2, whole.margins_L2)
    assert int(whole.counts_LE.sum()) == 2 * 2 * 8 * 12  # layers, experts per token, windows, tokens


def test_a_step_clips_to_the_limit_and_records_its_token_rate(model, mixture):
    optimizer, seen = build_optimizer(model, CONFIG.optimizer), []

    def clip(parameters, max_norm):
        seen.append((gradients(model), max_norm))
        return clip_gradients(parameters, max_norm)

    before = [p.detach().clone() for p in model.parameters()]
    tokens = CONFIG.tokens_per_step
    report = train_step(
        model, optimizer, microbatches(mixture, CONFIG, 1, CPU), Scales.of(CONFIG), CONFIG, tokens, clip
    )
    assert report.learning_rate == pytest.approx(1e-2 * 0.55)  # halfway through the warm-up
    assert [max_norm for _, max_norm in seen] == [1.0]
    squares = sum(float(g.double().square().sum()) for g in seen[0][0])
    assert report.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert set(report.values()) == {
        "cross_entropy", "load_balancing", "router_z", "learning_rate", "grad_norm", "max_load_over_mean",
        "expert_load", "expert_entropy", "dead_experts", "router_margin", "router_cutoff_margin",
    }  # fmt: skip


def test_a_record_has_the_load_of_every_expert():
    counts_LE = torch.tensor([[8, 8, 8, 8], [32, 0, 0, 0], [16, 0, 16, 0]])
    report = StepReport(counts_LE=counts_LE, margins_L2=torch.tensor([[0.5, 0.25], [0.1, math.nan], [0, 0]]))
    values = json.loads(json.dumps(report.values()))
    assert values["expert_load"] == [[8, 8, 8, 8], [32, 0, 0, 0], [16, 0, 16, 0]]
    assert values["expert_entropy"] == [1, 0, 0.5]
    assert values["dead_experts"] == [0, 3, 2]
    assert values["max_load_over_mean"] == pytest.approx((1 + 4 + 2) / 3)  # each layer by itself
    assert values["router_margin"] == [0.5, 0.1, 0]
    assert values["router_cutoff_margin"] == [0.25, None, 0]


def test_a_nonfinite_norm_changes_no_weight(model, mixture):
    config = replace(CONFIG, regularization=RegularizationConfig())
    optimizer = build_optimizer(model, config.optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=r"The gradient norm is nan at step 3; lower optimizer.learning_rate"):
        train_step(
            model, optimizer, microbatches(mixture, config, 2, CPU), Scales.of(config), config,
            2 * config.tokens_per_step, lambda parameters, norm: torch.tensor(math.nan),
        )  # fmt: skip
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
