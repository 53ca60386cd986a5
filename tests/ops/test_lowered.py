"""bf16 products of fp32 tensors against the reference, and against fp32 products up to rounding.

Both ways: by the kernels, whose results are fp32, and by operations on bf16 tensors.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops.cpu import extension, training
from ops.cpu.matrices import error
from ops.tolerances import forward_tolerance, gradient_tolerance

BF16 = torch.bfloat16
KERNELS = extension.available() and extension.kernels().has_bf16_products()


@pytest.fixture(params=["kernels", "composed"])
def way(request, monkeypatch):
    """How products are computed."""
    if request.param == "composed":
        monkeypatch.setattr(training, "takes_products", lambda *arguments, **indices: False)
    elif not KERNELS:
        pytest.skip("this CPU has no instruction for products in bf16, or there are no kernels")
    return request.param


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixture(n, e, k, d, f, routing="random"):
    """Ids of the chosen experts, and the differentiable inputs: hidden states, routing weights, the two stacks."""
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
    """Everything is fp32, and as close as bf16 tensors have to be."""
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
        ((700, 4, 2, 32, 160), "more rows than a block has"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("activation", [F.silu, F.gelu], ids=["silu", "gelu"])
def test_mixture(shape, reason, activation, way):
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


def rounded(t):
    return t.detach().bfloat16().float()


def by_definition(x, weight, grad):
    """x W^T and its gradients for `grad`: fp32 products of rounded factors."""
    return [rounded(x) @ rounded(weight).T, rounded(grad) @ rounded(weight), rounded(grad).T @ rounded(x)]


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias, way):
    inputs = [random(2, 9, 24), random(12, 24, seed=1), *([random(12, seed=2)] if bias else [])]
    ours = computed(ops.linear, inputs, products=BF16)
    assert_near(ours, computed(ops.linear, inputs, products=BF16, backend="reference"), "linear")
    assert_near(ours, computed(ops.linear, inputs), "linear")
    expected = rounded(inputs[0]) @ rounded(inputs[1]).T + (inputs[2] if bias else 0)
    assert error(ours[0], expected) < (2e-6 if way == "kernels" else 2**-8)


@pytest.mark.skipif(not KERNELS, reason="without an instruction for it results are rounded, too")
@pytest.mark.parametrize(
    ("n", "columns", "rows"),
    [
        pytest.param(1, 1, 1, id="one number"),
        pytest.param(6, 32, 64, id="one tile"),
        pytest.param(7, 257, 65, id="odd depths, one more of each than a tile has"),
        pytest.param(33, 600, 37, id="several depths, less than a panel"),
        pytest.param(300, 40, 520, id="more rows and columns than are gone through at a time"),
    ],
)
def test_kernels_round_only_the_factors(n, columns, rows):
    x, weight, grad = random(n, columns), random(rows, columns, seed=1), random(n, rows, seed=9)
    ours = computed(ops.linear, [x, weight], products=BF16)
    for mine, expected in zip(ours, by_definition(x, weight, grad), strict=True):
        assert error(mine, expected) < 2e-6


@pytest.mark.skipif(not KERNELS, reason="without an instruction for it results are rounded, too")
@pytest.mark.parametrize("shape", [(37, 8, 3, 33, 17), (700, 2, 1, 130, 70), (20, 30, 2, 300, 140)], ids=str)
def test_the_kernels_mixture_matches_the_reference_up_to_rounding_ties(shape):
    """Values that differ in the last fp32 bit may round to either of two neighbouring bf16 values."""
    ids, inputs = mixture(*shape)
    with torch.no_grad():
        ours, reference = (
            ops.moe(inputs[0], inputs[1], ids, *inputs[2:], F.silu, products=BF16, backend=backend)
            for backend in ("torch", "reference")
        )
    off = (ours - reference).abs() / reference.abs().max()
    assert float(off.mean()) < 2e-6
    assert float(off.max()) < 1e-3
    leaves = [t.clone().requires_grad_() for t in inputs]
    again = ops.moe(leaves[0], leaves[1], ids, *leaves[2:], F.silu, products=BF16)
    assert torch.equal(again.detach(), ours)  # whether gradients are wanted changes nothing


def heads_of(batch, query_heads, kv_heads, tokens, head_dim):
    counts = (query_heads, kv_heads, kv_heads)
    return [random(batch, n, tokens, head_dim, seed=i) for i, n in enumerate(counts)]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 4, 2, 9, 8), "ordinary, grouped heads"),
        ((1, 2, 2, 2, 16), "two tokens"),
        ((2, 3, 3, 67, 5), "odd widths, more tokens than a block has"),
        ((1, 4, 2, 301, 64), "more tokens than are gone through at a time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention(shape, reason, way):
    inputs = heads_of(*shape)
    ours = computed(ops.attention, inputs, causal=True, products=BF16)
    assert_near(ours, computed(ops.attention, inputs, causal=True, products=BF16, backend="reference"), "attention")
    in_fp32 = computed(ops.attention, inputs, causal=True)
    assert_near(ours, in_fp32, "attention")
    assert all(not torch.equal(a, b) for a, b in zip(ours, in_fp32, strict=True))


def test_attention_of_several_texts(way):
    lengths = [9, 2, 2, 130, 64]
    inputs = [random(sum(lengths), heads, 16, seed=i) for i, heads in enumerate((4, 2, 2))]

    def texts(q, k, v, **options):
        return ops.isolated_attention(q, k, v, lengths, **options)

    ours, in_fp32 = computed(texts, inputs, products=BF16), computed(texts, inputs)
    assert_near(ours, computed(texts, inputs, products=BF16, backend="reference"), "attention")
    assert all(not torch.equal(a, b) for a, b in zip(ours, in_fp32, strict=True))


@pytest.mark.parametrize("mask", [None, torch.tensor([[False, True, True, True, True]])], ids=["after others", "mask"])
def test_attention_that_the_kernels_do_not_support(mask, way):
    inputs = [random(2, 2, 3 if mask is None else 5, 8), *(random(2, 2, 5, 8, seed=i) for i in (1, 2))]
    options = {"causal": mask is None, "mask": mask}
    ours = computed(ops.attention, inputs, products=BF16, **options)
    assert_near(ours, computed(ops.attention, inputs, products=BF16, backend="reference", **options), "attention")


@pytest.mark.skipif(not KERNELS, reason="without an instruction for it results are rounded, too")
def test_the_kernels_attention_rounds_only_the_factors():
    """Few enough tokens to share one top score, so that probabilities are rounded before their sum is known."""
    inputs = heads_of(2, 2, 2, 50, 32)
    q, k, v = (rounded(t) for t in inputs)
    scores = (q @ k.mT / 32**0.5).masked_fill(torch.ones(50, 50).triu(1).bool(), float("-inf"))
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    expected = rounded(powers) @ v / powers.sum(-1, keepdim=True)
    ours = ops.attention(*inputs, causal=True, products=BF16)
    # An exponential between two neighbouring bf16 values may round to either.
    assert float((ours - expected).abs().mean() / expected.abs().max()) < 2e-6
    assert error(ours, expected) < 1e-3
    leaves = [t.clone().requires_grad_() for t in inputs]
    again = ops.attention(*leaves, causal=True, products=BF16)
    assert torch.equal(again.detach(), ours)  # whether gradients are wanted changes nothing


@pytest.mark.skipif(not KERNELS, reason="without an instruction for it results are rounded, too")
def test_the_kernels_query_gradients_are_unbiased():
    """Each query's score gradients sum to zero up to the rounding of probabilities: equal keys get no gradient."""
    q, _, v = heads_of(1, 1, 1, 200, 32)
    k = random(1, 1, 1, 32, seed=1).expand(1, 1, 200, 32)
    _, grad_q, grad_k, _ = computed(ops.attention, [q, k, v], causal=True, products=BF16)
    assert float(grad_q.abs().max()) < 0.01 * float(grad_k.abs().max())


@pytest.mark.skipif(not KERNELS, reason="there is nothing to leave out")
def test_without_bf16_instructions_torch_computes():
    x, weight = random(3, 8).requires_grad_(), random(4, 8)
    assert training.takes_products(BF16, x, weight)
    assert not training.takes_products(torch.float16, x, weight)
    before = extension.isa()
    try:
        for name in extension.isas():
            extension.set_isa(name)
            assert training.takes_products(BF16, x, weight) == (name == before)
            assert_near(
                computed(ops.linear, [x.detach(), weight], products=BF16),
                computed(ops.linear, [x.detach(), weight]),
                "linear",
            )
    finally:
        extension.set_isa(before)


@pytest.mark.parametrize(("n", "ignored"), [(10, 3), (700, 1), (5, 5)])
def test_cross_entropy(n, ignored, way):
    labels = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(3))
    labels[:ignored] = -100

    def loss(x, weight, **options):
        return ops.linear_cross_entropy(x, weight, labels, **options)

    inputs = [random(n, 24), random(50, 24, seed=1)]
    ours = computed(loss, inputs, products=BF16)
    assert_near(ours, computed(loss, inputs, products=BF16, backend="reference"), "linear_cross_entropy")
    assert_near(ours, computed(loss, inputs), "linear_cross_entropy")


def test_second_derivatives_match_the_reference(way):
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


def test_torch_func_transforms_work(way):
    ids, (x, weights, gate_up, down) = mixture(9, 4, 2, 8, 4)

    def loss(x):
        return ops.moe(x, weights, ids, gate_up, down, F.silu, products=BF16).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    found = torch.func.grad(loss)(x)
    assert float((found - leaf.grad).abs().max()) <= 2**-6 * float(leaf.grad.abs().max())
