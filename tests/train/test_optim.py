"""The optimizer, schedules and clipping against OLMo's rules."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from conftest import make_model
from olmoe.train.config import OptimizerConfig, ScheduleConfig
from olmoe.train.optim import build_optimizer, clip_gradients, learning_rate

PEAK = 4e-4
# OLMoE-1B-7B-0924: the main run, and the annealing that followed it.
PRETRAINING = ScheduleConfig(kind="cosine", total_tokens=5 * 10**12, warmup_tokens=10_485_760_000, final_fraction=0.1)
ANNEALING = ScheduleConfig(kind="linear", total_tokens=10**11, warmup_tokens=0, final_fraction=0.0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.1 * PEAK),
        (10_485_760_000 // 2, 0.55 * PEAK),
        (10_485_760_000, PEAK),
        ((5 * 10**12 + 10_485_760_000) // 2, 0.55 * PEAK),  # half a cosine: midway between the peak and its tenth
        (5 * 10**12, 0.1 * PEAK),
        (6 * 10**12, 0.1 * PEAK),
    ],
)
def test_cosine_schedule_at_its_key_points(tokens, expected):
    assert learning_rate(PRETRAINING, PEAK, tokens) == pytest.approx(expected, rel=1e-9)


def olmo_cosine(peak: float, tokens: int, warmup: int, total: int, alpha: float, warmup_min: float) -> float:
    """OLMo's `cosine_with_warmup`, written from its description."""
    if tokens < warmup:
        return warmup_min + (peak - warmup_min) * min(tokens, warmup) / warmup
    if tokens >= total:
        return peak * alpha
    floor = peak * alpha
    return floor + (peak - floor) * (1 + math.cos(math.pi * (tokens - warmup) / (total - warmup))) / 2


def test_cosine_schedule_is_olmos_everywhere():
    for tokens in range(0, 6 * 10**12, 77 * 10**9):
        expected = olmo_cosine(PEAK, tokens, 10_485_760_000, 5 * 10**12, 0.1, 0.1 * PEAK)
        assert learning_rate(PRETRAINING, PEAK, tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 4e-5), (0.25, 3e-5), (0.5, 2e-5), (1.0, 0.0), (2.0, 0.0)])
def test_linear_schedule_is_a_straight_line(share, expected):
    assert learning_rate(ANNEALING, 4e-5, int(share * 10**11)) == pytest.approx(expected, abs=1e-18)


def test_linear_schedule_starts_after_its_warmup():
    schedule = ScheduleConfig(kind="linear", total_tokens=300, warmup_tokens=100, final_fraction=0.5)
    assert [learning_rate(schedule, 1.0, t) for t in (0, 50, 100, 200, 300)] == pytest.approx([0.1, 0.55, 1, 0.75, 0.5])


def test_every_parameter_decays_in_one_group():
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    group["lr"] = 0.5
    optimizer.step()
    for name, p in model.named_parameters():  # without a gradient, only decay remains
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.1), msg=name)


def test_the_epsilon_is_the_configured_one():
    """At the first step the update is lr g / (|g| + eps), whatever the betas: 1 / (1 + 3) of the rate here."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(torch.nn.ParameterList([parameter]), OptimizerConfig(eps=3.0, learning_rate=0.5))
    parameter.grad = torch.tensor([1.0, -1.0, 0.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.125, 0.125, 0.0])


def test_steps_equal_adamw_written_out_and_torchs_plain_one():
    ours, plain = make_model(), make_model()
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    reference = torch.optim.AdamW(
        plain.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False, fused=False
    )
    # One matrix by hand, in double precision.
    value = ours.model.layers[0].mlp.gate.weight.detach().double()
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        g = ours.model.layers[0].mlp.gate.weight.grad.double()
        first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g * g
        value = value * (1 - 3e-3 * 0.1)
        value = value - 3e-3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.model.layers[0].mlp.gate.weight.detach().double(), value, rtol=1e-5, atol=1e-7)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def with_gradients(*values: list[float] | None) -> list[torch.Tensor]:
    tensors = []
    for value in values:
        tensor = torch.zeros(2 if value is None else len(value), requires_grad=True)
        tensor.grad = None if value is None else torch.tensor(value)
        tensors.append(tensor)
    return tensors


def test_gradients_above_the_limit_are_scaled_by_olmos_coefficient():
    parameters = with_gradients([3.0, 0.0], None, [0.0, 4.0])  # norm 5 over all of them; one has no gradient
    norm = clip_gradients(parameters, 1.0)
    assert float(norm) == pytest.approx(5.0)
    coefficient = 1.0 / (5.0 + 1e-6)
    assert parameters[0].grad.tolist() == pytest.approx([3 * coefficient, 0.0])
    assert parameters[2].grad.tolist() == pytest.approx([0.0, 4 * coefficient])
    assert parameters[1].grad is None


def test_gradients_below_the_limit_are_unchanged():
    parameters = with_gradients([0.3, 0.4])
    before = copy.deepcopy(parameters[0].grad)
    assert float(clip_gradients(parameters, 1.0)) == pytest.approx(0.5)
    assert torch.equal(parameters[0].grad, before)


def test_the_epsilon_of_the_coefficient_counts():
    parameters = with_gradients([1.0])
    clip_gradients(parameters, 1.0)  # exactly at the limit: 1 / (1 + 1e-6) is still below 1
    assert float(parameters[0].grad) == float(torch.tensor(1.0) / (torch.tensor(1.0) + 1e-6)) < 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_gradient_makes_the_norm_nonfinite(bad):
    assert not math.isfinite(float(clip_gradients(with_gradients([1.0], [bad]), 1.0)))
