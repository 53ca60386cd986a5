"""Under autocast, single products and attention use its dtype on every backend; everything else keeps its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops import cpu, torch_fast
from olmoe.ops.dispatch import LOWERED

N, E, K, D, F_ = 20, 6, 2, 16, 8
WIDTHS = {
    "aligned": F_,
    "not aligned": 5,
}  # the fallback multiplies expert by expert, which autocast would otherwise lower

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calls(width):
    """Each operation with products, on fp32 inputs as autocast would see them."""
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(n))[:K] for n in range(N)])
    rows = ops.sort_by_expert(ids, E)
    labels = torch.randint(0, 50, (N,), generator=torch.Generator().manual_seed(1))
    labels[:3] = -100
    weights = [random(E, 2 * width, D, seed=1) * D**-0.5, random(E, D, width, seed=2) * width**-0.5]
    routing = random(N, K, seed=3).softmax(-1)
    return {
        "linear": (lambda x, w, b, **o: ops.linear(x, w, b, **o), [random(N, D), random(8, D, seed=1), random(8)]),
        "attention": (
            lambda q, k, v, **o: ops.attention(q, k, v, causal=True, **o),
            [random(2, 4, 9, 16), random(2, 2, 9, 16, seed=1), random(2, 2, 9, 16, seed=2)],
        ),
        "isolated_attention": (
            lambda q, k, v, **o: ops.isolated_attention(q, k, v, [9, 1, 9, 1], **o),
            [random(N, 4, 16), random(N, 2, 16, seed=1), random(N, 2, 16, seed=2)],
        ),
        "experts": (
            lambda x, a, b, **o: ops.experts(x, rows.offsets_E, a, b, F.silu, **o),
            [random(N * K, D), *weights],
        ),
        "moe": (lambda x, w, a, b, **o: ops.moe(x, w, ids, a, b, F.silu, **o), [random(N, D), routing, *weights]),
        "combine": (lambda y, w, **o: ops.combine(y, w, rows, **o), [random(N * K, D), routing]),
        "linear_cross_entropy": (
            lambda x, w, **o: ops.linear_cross_entropy(x, w, labels, **o),
            [random(N, D), random(50, D, seed=1)],
        ),
    }


def results(function, inputs, backend, autocast, training):
    leaves = [t.clone().requires_grad_(training) for t in inputs]
    enabled = autocast is not None
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled), torch.set_grad_enabled(training):
        out = function(*leaves, backend=backend)
    if training:
        (out.float() * random(*out.shape, seed=9)).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves]


@dtypes
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("backend", ["torch", "reference", "auto", "cpu"])
@pytest.mark.parametrize("name", calls(F_))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("hardware", [True, False], ids=["native-bf16", "no-bf16-instructions"])
def test_operations_follow_autocast(name, backend, width, dtype, training, hardware, monkeypatch):
    monkeypatch.setattr(torch_fast, "cpu_multiplies_bf16", lambda: hardware)
    if backend == "cpu" and (training or not cpu.available() or "cpu" not in ops.backends(name)):
        pytest.skip("forward only")
    function, inputs = calls(width)[name]
    expected, expected_gradients = results(function, inputs, "reference", None, training)
    found, gradients = results(function, inputs, backend, dtype, training)
    lowered = name in LOWERED
    assert found.dtype == (dtype if lowered else torch.float32)
    tolerance = (2**-6 if dtype == torch.bfloat16 else 2**-9) if lowered else 5e-6
    scale = expected.abs().max()
    assert float((found.float() - expected).abs().max()) <= tolerance * scale
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        if training:
            assert ours.dtype == torch.float32
            # The incoming gradient of a lowered result has that dtype.
            allowed = 4 * tolerance if lowered else 1e-5
            assert float((ours - theirs).abs().max()) <= allowed * theirs.abs().max()


def test_mixed_dtypes_are_promoted_like_torchs_own_products():
    """Frozen half-precision weights with hidden states that autocast leaves in fp32, and the other way round."""
    function, (x, routing, gate_up, down) = calls(F_)["moe"]
    expected = function(x, routing, gate_up, down)
    with torch.autocast("cpu"):
        assert torch.allclose(function(x, routing, gate_up.bfloat16(), down.bfloat16()), expected, atol=0.1)
        lower = function(x.bfloat16(), routing, gate_up, down)
    assert lower.dtype == torch.bfloat16
    assert torch.allclose(lower.float(), expected, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_have_no_autocast(dtype):
    x = torch.empty(3, 4, device="meta", dtype=dtype)
    with torch.autocast("cpu"):
        assert ops.linear(x, x).shape == (3, 3)
