"""Documents packed into one window compute the same as separately."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from configurations import VOCAB_SIZE
from conftest import make_model
from olmoe.model import causal_attend
from olmoe.train.config import LossConfig
from olmoe.train.document_mask import document_lengths, isolated_attend, positions_and_attention
from olmoe.train.losses import objective

EOS = VOCAB_SIZE - 1


def windows() -> torch.Tensor:
    """Two windows of 12 ids: documents of 5, 1, 4 and 2 (the last is cut off), and one that fills its window."""
    ids = torch.randint(0, EOS, (2, 12), generator=torch.Generator().manual_seed(5))
    ids[0, [4, 5, 9]] = EOS
    return ids


def test_lengths_run_between_ends_of_documents_and_windows():
    assert document_lengths(windows(), EOS) == [5, 1, 4, 2, 12]
    assert document_lengths(torch.full((2, 3), EOS), EOS) == [1] * 6
    ends = torch.tensor([[1, 2, EOS]])
    assert document_lengths(ends, EOS) == [3]


def test_positions_restart_in_every_document():
    positions, _ = positions_and_attention(windows(), EOS)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 1], list(range(12))]


def test_without_a_mask_attention_crosses_documents():
    positions, attend = positions_and_attention(windows(), None)
    assert positions.tolist() == [list(range(12))] * 2
    assert attend is causal_attend


def test_hidden_states_and_routing_are_those_of_separate_documents():
    model, ids = make_model(), windows()
    together = model(ids, *positions_and_attention(ids, EOS))
    flat, start = together.hidden.flatten(0, 1), 0
    for length in document_lengths(ids, EOS):
        part = ids.flatten()[start : start + length].unsqueeze(0)
        alone = model(part, torch.arange(length).unsqueeze(0), causal_attend)
        torch.testing.assert_close(flat[start : start + length], alone.hidden[0], rtol=0, atol=1e-6)
        for one, other in zip(together.routers, alone.routers, strict=True):
            torch.testing.assert_close(one.logits[start : start + length], other.logits, rtol=0, atol=1e-6)
        start += length
    crossed = model(ids, *positions_and_attention(ids, None)).hidden.flatten(0, 1)
    assert (crossed[6:12] - flat[6:12]).abs().max() > 1e-2  # so the mask does make a difference
    torch.testing.assert_close(crossed[12:], flat[12:], rtol=0, atol=1e-6)


def test_gradients_are_those_of_separate_documents():
    """Of the training loss: it predicts every next id in the window, a document's first id from the previous end."""
    model, ids = make_model(), windows()
    none = LossConfig(load_balancing=0.0, router_z=0.0)
    losses = objective(model, ids, none, positions_in_step=24, microbatches=1, eos_id=EOS)
    losses.objective.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1).flatten()
    total, start = 0.0, 0
    for length in document_lengths(ids, EOS):
        part = ids.flatten()[start : start + length].unsqueeze(0)
        hidden = model(part, torch.arange(length).unsqueeze(0), causal_attend).hidden[0]
        loss = F.cross_entropy(model.logits(hidden), labels[start : start + length], reduction="sum") / 24
        if length > 1 or labels[start] != -100:
            loss.backward()
            total += float(loss.detach())
        start += length
    assert float(losses.cross_entropy) == pytest.approx(total, abs=1e-6)
    for ours_, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(ours_, parameter.grad, rtol=1e-4, atol=1e-6)


def test_grouped_heads_and_flat_tokens_are_isolated():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(9, 4, 8, generator=generator)
    k, v = (torch.randn(9, 2, 8, generator=generator) for _ in range(2))
    found = isolated_attend([3, 3, 1, 2])(q, k, v, 0)
    assert found.shape == q.shape
    for start, length in ((0, 3), (3, 3), (6, 1), (7, 2)):
        at = slice(start, start + length)
        alone = causal_attend(q[None, at], k[None, at], v[None, at], 0)[0]
        torch.testing.assert_close(found[at], alone, rtol=0, atol=1e-6)


def test_bf16_products_of_isolated_documents_match_separate_ones():
    """bf16 products give the same as for documents alone, and a different result from fp32, isolated or not."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 12, 2, 8, generator=generator) for _ in range(3))
    for eos in (None, EOS):
        found, in_fp32 = (
            positions_and_attention(windows(), eos, products)[1](q, k, v, 0) for products in (torch.bfloat16, None)
        )
        assert not torch.equal(found, in_fp32)
        torch.testing.assert_close(found, in_fp32, rtol=0, atol=0.02)
    length = document_lengths(windows(), EOS)[0]
    alone = causal_attend(*(t[:1, :length] for t in (q, k, v)), 0, torch.bfloat16)
    torch.testing.assert_close(found[:1, :length], alone, rtol=0, atol=1e-2)
