"""Transforms that trace single operations: second derivatives, forward mode, and torch.func.

Every operation of the backend "torch" (and what "auto" chooses) against the reference, which torch traces itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from olmoe import ops
from olmoe.ops import cpu
from olmoe.ops.cpu import extension
from olmoe.ops.transforms import mapped, observed, transformed

N, E, K, D, F_ = 9, 5, 2, 8, 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(n))[:K] for n in range(N)])
IDS[IDS == 3] = 4  # an expert without tokens
ROWS = ops.sort_by_expert(IDS, E)
LABELS = torch.tensor([0, 3, -100, 7, 5, 2, 10, -100, 1])
MASK = torch.ones(1, 1, 1, 6, dtype=torch.bool)
MASK[..., :2] = False  # with causal attention the first queries may attend to nothing
WEIGHTS = [random(E, 2 * F_, D, seed=1) * D**-0.5, random(E, D, F_, seed=2) * F_**-0.5]
ODD = [random(E, 2 * 3, D, seed=1) * D**-0.5, random(E, D, 3, seed=2)]  # no grouped product takes these
ROUTING = random(N, K, seed=3).softmax(-1)
ANGLES = random(5, 4, seed=1)
TEXTS = [random(9, 4, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)]
QKV = [random(1, 4, 6, 8), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 8, seed=2)]


def experts(x, gate_up, down, **o):
    return ops.experts(x, ROWS.offsets_E, gate_up, down, F.silu, **o)


def moe(x, w, gate_up, down, **o):
    return ops.moe(x, w, IDS, gate_up, down, F.silu, **o)


CALLS = {
    "linear": (ops.linear, [random(N, D), random(6, D, seed=1), random(6, seed=2)]),
    "rms_norm": (lambda x, w, **o: ops.rms_norm(x, w, 1e-5, **o), [random(N, D), random(D, seed=1)]),
    "apply_rope": (
        lambda x, **o: ops.apply_rope(x, ANGLES.cos(), ANGLES.sin(), **o),
        [random(5, 3, 8)],
    ),
    "attention": (lambda q, k, v, **o: ops.attention(q, k, v, causal=True, **o), QKV),
    "attention, padded": (lambda q, k, v, **o: ops.attention(q, k, v, MASK, causal=True, **o), QKV),
    "isolated_attention": (lambda q, k, v, **o: ops.isolated_attention(q, k, v, [2, 2, 5], **o), TEXTS),
    "route": (lambda x, **o: ops.route(x, K, True, **o)[0], [random(N, E)]),
    "gather_rows": (lambda x, **o: ops.gather_rows(x, ROWS, **o), [random(N, D)]),
    "experts": (experts, [random(N * K, D), *WEIGHTS]),
    "experts, odd": (experts, [random(N * K, D), *ODD]),
    "combine": (lambda y, w, **o: ops.combine(y, w, ROWS, **o), [random(N * K, D), ROUTING]),
    "moe": (moe, [random(N, D), ROUTING, *WEIGHTS]),
    "moe, gelu": (
        lambda x, w, a, b, **o: ops.moe(x, w, IDS, a, b, F.gelu, **o),
        [random(N, D), ROUTING, *WEIGHTS],
    ),
    "linear_cross_entropy": (
        lambda x, w, **o: ops.linear_cross_entropy(x, w, LABELS, **o),
        [random(N, D), random(11, D, seed=1)],
    ),
}
every = pytest.mark.parametrize("name", CALLS)


def close(ours, theirs, tolerance=2e-5):
    ours, theirs = (torch.utils._pytree.tree_leaves(t) for t in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp(min=1e-6))


def scalar(function, **options):
    """A function whose second derivatives depend on every value."""
    return lambda *inputs: (function(*inputs, **options) ** 3).sum()


def test_every_operation_is_covered():
    tested = {name.partition(",")[0] for name in CALLS}
    chosen = {"sort_by_expert", "sample"}  # their results are ids
    # Numeric differences of rounded results say nothing; test_lowered.py tests these.
    rounding = {"lowered_linear", "lowered_attention", "lowered_moe", "lowered_cross_entropy"}
    assert sorted(tested | chosen | rounding) == sorted(ops.dispatch._REGISTRY)


@every
@pytest.mark.parametrize("order", [2, 3])
def test_second_derivatives(name, order):
    function, inputs = CALLS[name]
    results = {}
    for backend in ("reference", "auto"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        value = scalar(function, backend=backend)(*leaves)
        for step in range(order):
            found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
            directions = [random(*x.shape, seed=20 + 5 * step + i) for i, x in enumerate(leaves)]
            value = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
        results[backend] = [g.detach() for g in found]
    close(results["auto"], results["reference"], 1e-4)


@every
def test_gradients_of_a_single_input(name):
    """The others are frozen, as with adapters or a gradient penalty on inputs."""
    function, inputs = CALLS[name]
    for wanted in range(len(inputs)):
        results = {}
        for backend in ("reference", "auto"):
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
            (first,) = torch.autograd.grad(
                scalar(function, backend=backend)(*leaves), leaves[wanted], create_graph=True
            )
            results[backend] = torch.autograd.grad(first.square().sum(), leaves[wanted])
        close(results["auto"], results["reference"], 1e-4)


@every
def test_expanded_scalar_gradients(name):
    """As a sum produces them; torch's grouped product refuses such memory."""
    function, inputs = CALLS[name]
    results = {}
    for backend in ("reference", "auto"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        plain = torch.autograd.grad(function(*leaves, backend=backend).sum(), leaves)
        first = torch.autograd.grad(scalar(function, backend=backend)(*leaves), leaves, create_graph=True)
        results[backend] = [*plain, *torch.autograd.grad(sum(g.sum() for g in first), leaves)]
    close(results["auto"], results["reference"], 1e-4)


@every
def test_second_derivatives_match_numeric_ones(name):
    """Against differences of first derivatives, since the reference could be wrong in the same way."""
    function, inputs = CALLS[name]
    directions = [random(*t.shape, seed=30 + i) for i, t in enumerate(inputs)]

    def first(step):
        leaves = [(t + step * d).requires_grad_() for t, d in zip(inputs, directions, strict=True)]
        return torch.autograd.grad(scalar(function)(*leaves), leaves)

    leaves = [t.clone().requires_grad_() for t in inputs]
    found = torch.autograd.grad(scalar(function)(*leaves), leaves, create_graph=True)
    product = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    second = torch.autograd.grad(product, leaves)
    h = 3e-3
    differences = [(a - b) / (2 * h) for a, b in zip(first(h), first(-h), strict=True)]
    close(second, differences, 2e-2)


@every
def test_forward_mode(name):
    function, inputs = CALLS[name]
    tangents = tuple(random(*t.shape, seed=40 + i) for i, t in enumerate(inputs))
    with torch.no_grad():
        expected = jvp(lambda *t: function(*t, backend="reference"), tuple(inputs), tangents)
        close(jvp(function, tuple(inputs), tangents), expected)  # even where the kernels would be chosen
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
            close(tuple(forward_ad.unpack_dual(function(*dual))), expected)


@every
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(name, transform):
    function, inputs = CALLS[name]
    everything = tuple(range(len(inputs)))
    expected = transform(lambda *t: function(*t, backend="reference"), everything)(*inputs)
    close(transform(function, everything)(*inputs), expected)


@every
def test_vmap_over_incoming_gradients(name):
    function, inputs = CALLS[name]
    results = {}
    for backend in ("reference", "auto"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves, backend=backend)
        incoming = random(3, *out.shape, seed=50)
        results[backend] = torch.autograd.grad(out, leaves, incoming, is_grads_batched=True)
    close(results["auto"], results["reference"])


@every
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_vmap_over_inputs(name, training):
    function, inputs = CALLS[name]
    batch = [torch.stack([t, 2 * t, t.flip(0)]) for t in inputs]
    with torch.set_grad_enabled(training):
        close(vmap(function)(*batch), torch.stack([function(*row) for row in zip(*batch, strict=True)]))


@every
def test_per_example_gradients(name):
    """vmap over gradients: the first input is the example, the others are shared."""
    function, inputs = CALLS[name]
    batch = torch.stack([inputs[0], 2 * inputs[0], inputs[0].flip(0)])
    gradient = grad(scalar(function), tuple(range(len(inputs))))
    found = vmap(gradient, in_dims=(0, *[None] * (len(inputs) - 1)))(batch, *inputs[1:])
    expected = [gradient(x, *inputs[1:]) for x in batch]
    close(list(found), [torch.stack(parts) for parts in zip(*expected, strict=True)])


def routed(x, router, gate_up, down):
    """A whole block, whose experts are chosen per example."""
    weights_NK, ids_NK = ops.route(x @ router.T, K)
    rows = ops.sort_by_expert(ids_NK, E)
    split = ops.experts(ops.gather_rows(x, rows), rows.offsets_E, gate_up, down, F.silu)
    return ops.moe(x, weights_NK, ids_NK, gate_up, down, F.silu) + ops.combine(split, weights_NK, rows)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_vmap_over_the_input_of_the_router(training):
    x, router = random(4, N, D), random(E, D, seed=4)
    with torch.set_grad_enabled(training):
        expected = torch.stack([routed(row, router, *WEIGHTS) for row in x])
        close(vmap(routed, in_dims=(0, None, None, None))(x, router, *WEIGHTS), expected)
        routers = random(3, E, D, seed=5)  # an ensemble
        expected = torch.stack([routed(x[0], r, *WEIGHTS) for r in routers])
        close(vmap(routed, in_dims=(None, 0, None, None))(x[0], routers, *WEIGHTS), expected)


def test_per_example_gradients_through_routing():
    x, router = random(4, N, D), random(E, D, seed=4)
    gradient = grad(scalar(routed), (0, 1, 2, 3))
    found = vmap(gradient, in_dims=(0, None, None, None))(x, router, *WEIGHTS)
    expected = [gradient(row, router, *WEIGHTS) for row in x]
    close(list(found), [torch.stack(parts) for parts in zip(*expected, strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_transforms_in_half_precision(dtype):
    inputs = tuple(t.to(dtype) for t in (random(N, D), random(E, D, seed=4), *WEIGHTS))
    with torch.no_grad():
        tangents = tuple(torch.ones_like(t) for t in inputs)
        assert jvp(routed, inputs, tangents)[1].dtype == dtype
        close(vmap(routed)(*(t[None] for t in inputs))[0].float(), routed(*inputs).float(), 0.05)
        wide = jvp(ops.linear, (inputs[0], inputs[1]), tangents[:2])[1].float()
    expected = jvp(ops.linear, tuple(t.float() for t in inputs[:2]), tuple(t.float() for t in tangents[:2]))[1]
    close(wide, expected, 0.02)


def test_first_order_passes_do_not_use_plain_code(monkeypatch):
    """Ordinary training is unchanged: plain code runs only under a transform."""
    for module, names in (
        (ops.torch_fast.composable, ("sum_rows", "combine_gradients", "gated_unit_gradient", "experts", "moe")),
        (ops.torch_fast, ("plain_gradients", "plain_cross_entropy", "plain_attention")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *a, name=name: pytest.fail(name))
    for function, inputs in CALLS.values():
        scalar(function)(*(t.clone().requires_grad_() for t in inputs)).backward()


@pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")
def test_kernels_refuse_transformed_and_fake_tensors():
    x = torch.randn(2, 4)
    reasons = []

    def ask(t):
        reasons.append(extension.unsupported(t))
        return t

    with torch.no_grad():
        assert extension.unsupported(x) is None
        vmap(ask)(x)
        jvp(ask, (x,), (x,))
        with forward_ad.dual_level():
            ask(forward_ad.make_dual(x, x))
        with torch._subclasses.FakeTensorMode() as mode:
            ask(mode.from_tensor(x))

        class Observer(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        with Observer():
            assert observed()
            ask(x)
    assert None not in reasons
    assert len(reasons) == 5
    assert extension.unsupported(x.requires_grad_().detach()) is None


def test_active_transforms_are_detected():
    x = torch.randn(2, 3)
    seen = []
    vmap(lambda t: seen.append((transformed(), mapped(t), mapped(x))) or t)(x)
    grad(lambda t: seen.append((transformed(), mapped(t), mapped(x))) or t.sum())(x)
    vmap(grad(lambda t: seen.append((transformed(), mapped(t), mapped(x))) or t.sum()))(x)
    assert seen == [(True, True, False), (True, False, False), (True, True, False)]
    assert not transformed(x)
    assert not observed()
