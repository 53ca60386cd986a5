"""OLMoE's router losses under padding; `tests/train/test_losses.py` has the formulas themselves."""

from __future__ import annotations

import pytest
import torch

from olmoe.model import RouterOutput
from olmoe.model.router_losses import load_balancing, router_z
from olmoe.ops import route


def routers(tokens=40, experts=8, k=3, layers=2):
    generator = torch.Generator().manual_seed(0)
    return [
        RouterOutput(logits, *route(logits, k))
        for logits in (2 * torch.randn(tokens, experts, generator=generator) for _ in range(layers))
    ]


def only(outputs, mask):
    return [RouterOutput(*(part[mask] for part in output)) for output in outputs]


@pytest.mark.parametrize("loss", [load_balancing, router_z])
def test_masked_tokens_count_for_nothing(loss):
    outputs, mask = routers(), torch.arange(40) % 3 != 0
    assert loss(outputs, mask) == pytest.approx(float(loss(only(outputs, mask))))
    assert float(loss(outputs, mask)) != pytest.approx(float(loss(outputs)), rel=1e-3)


@pytest.mark.parametrize("loss", [load_balancing, router_z])
def test_masked_tokens_get_no_gradient(loss):
    outputs, mask = routers(), torch.arange(40) < 30
    leaves = [output.logits.requires_grad_() for output in outputs]
    loss(outputs, mask).backward()
    for leaf in leaves:
        assert leaf.grad[mask].abs().sum() > 0
        assert (leaf.grad[~mask] == 0).all()


def test_uniform_load_and_probabilities_give_one():
    logits = torch.zeros(8, 4)
    ids = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    output = RouterOutput(logits, torch.full((8, 2), 0.25), ids)
    assert float(load_balancing([output, output])) == pytest.approx(1.0)
