"""Products of fp32 tensors in bf16 against the reference, and against products in fp32 within what rounding may do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops import lowered
from ops.tolerances import forward_tolerance, gradient_tolerance

BF16 = torch.bfloat16


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixture(n, e, k, d, f, routing="random"):
    """Ids of the chosen experts, and what has a gradient: hidden states, routing weights, the two stacks."""
    ids = torch.stack([torch.randperm(e, generator=torch.Generator().manual_seed(i))[:k] for i in range(n)])
    if routing == "first":
        ids = torch.arange(k).expand(n, -1)
    routing_NK = random(n, k, seed=1).softmax(-1)
    return ids, [random(n, d), routing_NK, random(e, 2 * f, d, seed=2) * d**-0.5, random(e, d, f, seed=3) * f**-0.5]


def computed(function, inputs, **options):
    """The result and the gradients of all inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves, **options)
    (out * random(*out.shape, seed=9)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_near(ours, theirs, operation="moe"):
    """Each in fp32, and as near as tensors of bf16 must be."""
    allowed = [forward_tolerance(operation, BF16)] + [gradient_tolerance(operation, BF16)] * (len(ours) - 1)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == torch.float32
        assert torch.isfinite(a).all()
        assert float((a - b).abs().max()) <= allowed[number] * float(b.abs().max().clamp(min=1e-6)), number


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((37, 8, 3, 32, 16), "ordinary"),
        ((1, 8, 2, 16, 8), "one token: most experts empty"),
        ((20, 6, 2, 8, 5), "odd widths"),
        ((30, 5, 2, 16, 8, "first"), "two experts get everything"),
        ((700, 4, 2, 32, 160), "more rows than the gated unit takes at once"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("activation", [F.silu, F.gelu], ids=["silu", "gelu"])
def test_mixture(shape, reason, activation, monkeypatch):
    monkeypatch.setattr(lowered, "UNIT_NUMBERS", 2**16)
    ids, inputs = mixture(*shape)

    def moe(x, weights, gate_up, down, **options):
        return ops.moe(x, weights, ids, gate_up, down, activation, **options)

    ours = computed(moe, inputs, products=BF16)
    reference = computed(moe, inputs, products=BF16, backend="reference")
    assert_near(ours, reference)
    in_fp32 = computed(moe, inputs)
    assert_near(ours, in_fp32)
    assert all(not torch.equal(a, b) for a, b in zip(ours, in_fp32, strict=True))


def test_mixture_of_no_tokens():
    ids, inputs = mixture(1, 4, 2, 8, 4)
    out = ops.moe(inputs[0][:0], inputs[1][:0], ids[:0], *inputs[2:], F.silu, products=BF16)
    assert out.shape == (0, 8)


def test_padding_depends_on_counts_only_by_its_step():
    """A fraction of a mean count, so that oneDNN meets few shapes and few rows are computed in vain."""
    assert [lowered._step(rows, 64) for rows in (1, 64 * 64, 64 * 512, 64 * 10**5)] == [16, 16, 128, 512]


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    inputs = [random(2, 9, 24), random(12, 24, seed=1), *([random(12, seed=2)] if bias else [])]
    ours = computed(ops.linear, inputs, products=BF16)
    assert_near(ours, computed(ops.linear, inputs), "linear")
    rounded = [t.bfloat16().float() for t in inputs[:2]] + inputs[2:]
    assert torch.allclose(ours[0], ops.linear(*rounded), rtol=2**-7, atol=2**-7)  # one rounding, of the result


@pytest.mark.parametrize(("n", "ignored"), [(10, 3), (700, 1), (5, 5)])
def test_cross_entropy(n, ignored):
    labels = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(3))
    labels[:ignored] = -100

    def loss(x, weight, **options):
        return ops.linear_cross_entropy(x, weight, labels, **options)

    inputs = [random(n, 24), random(50, 24, seed=1)]
    ours = computed(loss, inputs, products=BF16)
    assert_near(ours, computed(loss, inputs, products=BF16, backend="reference"), "linear_cross_entropy")
    assert_near(ours, computed(loss, inputs), "linear_cross_entropy")


def test_derivatives_of_derivatives_are_those_of_the_reference():
    ids, inputs = mixture(9, 4, 2, 8, 4)
    labels = torch.arange(9)

    def function(x, weights, gate_up, down, **options):
        y = ops.moe(x, weights, ids, gate_up, down, F.silu, products=BF16, **options)
        return ops.linear_cross_entropy(y, gate_up.flatten(0, 1), labels, products=BF16, **options)

    results = []
    for backend in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        first = torch.autograd.grad(function(*leaves, backend=backend), leaves, create_graph=True)
        torch.stack([g.square().sum() for g in first]).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= 2**-5 * float(b.abs().max())


def test_transforms_of_torch_func_follow():
    ids, (x, weights, gate_up, down) = mixture(9, 4, 2, 8, 4)

    def loss(x):
        return ops.moe(x, weights, ids, gate_up, down, F.silu, products=BF16).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    found = torch.func.grad(loss)(x)
    assert float((found - leaf.grad).abs().max()) <= 2**-6 * float(leaf.grad.abs().max())
