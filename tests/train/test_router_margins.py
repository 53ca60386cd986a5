"""How far routers' choices are from being different."""

from __future__ import annotations

import pytest
import torch

from olmoe.model import RouterOutput
from olmoe.train.router_margins import router_margins


def routed(probabilities, k: int) -> RouterOutput:
    p = torch.tensor(probabilities)
    weights, ids = p.topk(k)
    return RouterOutput(p.log() + 3.0, weights, ids)  # shifting all logits changes nothing


def test_margins_are_means_over_tokens():
    found = router_margins(routed([[0.1, 0.5, 0.05, 0.35], [0.4, 0.2, 0.3, 0.1]], k=2))
    assert found.tolist() == pytest.approx([(0.15 + 0.1) / 2, (0.25 + 0.1) / 2], abs=1e-6)


def test_a_single_expert_per_token_has_one_margin():
    assert router_margins(routed([[0.1, 0.6, 0.3]], k=1)).tolist() == pytest.approx([0.3, 0.3], abs=1e-6)


def test_with_all_experts_chosen_the_last_margin_is_its_probability():
    assert router_margins(routed([[0.3, 0.7]], k=2)).tolist() == pytest.approx([0.4, 0.3], abs=1e-6)
    assert router_margins(routed([[1.0]], k=1)).tolist() == pytest.approx([1.0, 1.0])


def test_margins_carry_no_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    assert not router_margins(RouterOutput(logits, *logits.softmax(-1).topk(2))).requires_grad
