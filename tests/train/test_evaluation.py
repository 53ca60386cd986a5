"""Bits per byte against a plain computation from full logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import make_model
from olmoe.model import causal_attend
from olmoe.train import evaluation
from olmoe.train.data import TokenFile
from olmoe.train.evaluation import evaluate

TOKENS = np.random.default_rng(0).integers(0, 320, 53).astype("<u2")
FILE = TokenFile("some", "some.npy", len(TOKENS), documents=2, text_bytes=131)


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def nats_by_hand(model, tokens: np.ndarray, length: int, predictions: int) -> float:
    """The nats of all predictions, one window at a time, from full logits in double precision."""
    ids, total = torch.from_numpy(tokens.astype("int64")), 0.0
    for start in range(0, predictions, length):
        inputs = ids[start : min(start + length, predictions)]
        hidden = model(inputs.unsqueeze(0), torch.arange(len(inputs)).unsqueeze(0), causal_attend).hidden
        log_p = model.logits(hidden)[0].double().log_softmax(-1)
        total -= sum(float(log_p[t, ids[start + t + 1]]) for t in range(len(inputs)))
    return total


@pytest.mark.parametrize("length", [1, 10, 13, 26, 52, 200])  # divisors of the 52 predictions and not; one window
@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])  # one window per batch, several, all at once
def test_bits_per_byte_of_a_whole_file(model, monkeypatch, length, batch_tokens):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", batch_tokens)
    result = evaluate(model, FILE, TOKENS, length)
    nats = nats_by_hand(model, TOKENS, length, 52)
    assert result.tokens == 52  # every token except the first
    assert result.loss == pytest.approx(nats / 52, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 131, rel=1e-5)


@pytest.mark.parametrize(("windows", "starts"), [(1, [0]), (2, [0, 20]), (3, [0, 10, 30]), (5, [0, 10, 20, 30, 40])])
def test_sampled_windows_are_spread_over_the_file_and_count_their_share_of_bytes(model, windows, starts):
    result = evaluate(model, FILE, TOKENS, 10, windows)
    nats = sum(nats_by_hand(model, TOKENS[start : start + 11], 10, 10) for start in starts)
    predictions = 10 * windows
    assert result.tokens == predictions
    assert result.loss == pytest.approx(nats / predictions, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / (131 * predictions / 52), rel=1e-5)


@pytest.mark.parametrize("windows", [6, 99, 0])
def test_asking_for_more_windows_than_exist_takes_all(model, windows):
    assert evaluate(model, FILE, TOKENS, 10, windows).tokens == 52


def test_counts_cover_every_routed_token_of_every_layer(model):
    result = evaluate(model, FILE, TOKENS, 10)
    expected = torch.zeros(2, 8, dtype=torch.long)
    ids = torch.from_numpy(TOKENS.astype("int64"))
    for start in range(0, 52, 10):
        inputs = ids[start : min(start + 10, 52)].unsqueeze(0)
        for layer, router in enumerate(model(inputs, torch.arange(inputs.shape[1])[None], causal_attend).routers):
            for expert in router.expert_ids.flatten().tolist():
                expected[layer, expert] += 1
    assert torch.equal(result.counts_LE, expected)
    assert result.counts_LE.sum(dim=1).tolist() == [52 * 3, 52 * 3]


def test_bits_per_byte_are_unknown_without_the_text(model):
    result = evaluate(model, TokenFile("foreign", "foreign.npy", len(TOKENS)), TOKENS, 10)
    assert math.isnan(result.bits_per_byte)
    assert math.isfinite(result.loss)


def test_evaluation_leaves_the_model_trainable(model):
    flags = [p.requires_grad for p in model.parameters()]
    evaluate(model, FILE, TOKENS, 10, 1)
    assert [p.requires_grad for p in model.parameters()] == flags == [True] * len(flags)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
