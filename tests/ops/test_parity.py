"""Every backend of every operation against the reference: values, and the gradient of every input.

Outputs that a backend allocates with `torch.empty` are poisoned with NaN, so that forgotten rows show.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops import cpu, torch_fast
from ops.tolerances import forward_tolerance, gradient_tolerance
from sentences import refused

OPERATIONS = [
    "linear", "rms_norm", "apply_rope", "attention", "isolated_attention", "route", "sort_by_expert",
    "gather_rows", "experts", "combine", "moe", "linear_cross_entropy",
    "sample",  # in cpu/test_sampling_parity.py
    "lowered_linear", "lowered_attention", "lowered_moe", "lowered_cross_entropy",  # in test_lowered.py
]  # fmt: skip


class Shape(NamedTuple):
    """A mixture-of-experts call: tokens, experts, chosen, hidden, expert width, and why it is here."""

    n: int
    e: int
    k: int
    d: int
    f: int
    reason: str
    routing: str = "random"


SHAPES = [
    Shape(37, 8, 3, 32, 16, "ordinary"),
    Shape(1, 8, 2, 16, 8, "one token: most experts empty"),
    Shape(16, 4, 1, 16, 8, "K=1"),
    Shape(9, 4, 4, 16, 8, "K=E: every expert sees every token"),
    Shape(20, 6, 2, 8, 5, "odd widths that grouped kernels cannot align"),
    Shape(30, 5, 2, 16, 8, "two experts get everything, the others nothing", "first"),
    Shape(64, 64, 8, 16, 4, "OLMoE's 64 experts, top-8"),
    Shape(130, 8, 2, 600, 520, "wider than one piece of a converted weight"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Make `torch.empty` and `empty_like` return NaN inside the fast backend."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-(2**30))

    monkeypatch.setattr(torch_fast.torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch_fast.torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture(params=[True, False], ids=["native-bf16", "no-bf16-instructions"])
def bf16_hardware(request, monkeypatch):
    """Both kinds of CPU, simulated on any CPU."""
    monkeypatch.setattr(torch_fast, "cpu_multiplies_bf16", lambda: request.param)
    return request.param


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def routed(shape: Shape):
    """Expert ids (N, K), distinct in each row."""
    if shape.routing == "first":
        return torch.arange(shape.k).expand(shape.n, -1).contiguous()
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(shape.e, generator=generator)[: shape.k] for _ in range(shape.n)])


def close(ours, theirs, tolerance, what):
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    scale = theirs.float().abs().max().clamp(min=1e-6)
    error = float((ours.float() - theirs.float()).abs().max() / scale)
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.2e}"


def compare(operation, function, inputs, backend, dtype, gradients=True):
    """Run `function(*inputs, backend=...)` on both backends and compare results and gradients (forward only: "cpu")."""
    results, gradients = {}, gradients and backend != "cpu"
    for name in ("reference", backend):
        leaves = [t.detach().clone().requires_grad_(gradients and t.is_floating_point()) for t in inputs]
        with torch.set_grad_enabled(gradients):
            out = function(*leaves, backend=name)
        if gradients:
            (out.float() * random(max(out.numel(), 1), seed=99).view(out.shape)).sum().backward()
        results[name] = out.detach(), [leaf.grad for leaf in leaves if leaf.requires_grad]
    close(results[backend][0], results["reference"][0], forward_tolerance(operation, dtype), "forward")
    for number, (ours, theirs) in enumerate(zip(results[backend][1], results["reference"][1], strict=True)):
        close(ours, theirs, gradient_tolerance(operation, dtype), f"gradient of input {number}")


dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)


def backends(operation):
    """Every fast backend of an operation; the C++ kernels have to be built."""
    missing = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")
    names = [b for b in ops.backends(operation) if b != "reference"]
    return pytest.mark.parametrize("backend", [pytest.param(b, marks=[missing] * (b == "cpu")) for b in names])


gradients = pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])


def test_every_operation_is_compared_here():
    assert sorted(ops.dispatch._REGISTRY) == sorted(OPERATIONS)


@dtypes
@backends("linear")
@gradients
@pytest.mark.parametrize(
    ("rows", "width", "out", "bias"),
    [
        (7, 33, 12, True),  # odd inner width
        (1, 16, 8, False),  # decode
        (12, 64, 1100, True),  # more outputs than one converted part
    ],
)
def test_linear(rows, width, out, bias, gradients, backend, dtype, bf16_hardware):
    x = random(2, rows, width, dtype=dtype)
    weight, b = random(out, width, dtype=dtype, seed=1), random(out, dtype=dtype, seed=2)
    if bias:
        compare(
            "linear",
            lambda x, w, b, backend: ops.linear(x, w, b, backend=backend),
            [x, weight, b],
            backend,
            dtype,
            gradients,
        )
    else:
        compare(
            "linear", lambda x, w, backend: ops.linear(x, w, backend=backend), [x, weight], backend, dtype, gradients
        )


@dtypes
@backends("rms_norm")
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 33), (1, 1)], ids=str)
def test_rms_norm(shape, backend, dtype):
    inputs = [random(*shape, dtype=dtype, scale=3.0), random(shape[-1], dtype=dtype, seed=1)]
    compare("rms_norm", lambda x, w, backend: ops.rms_norm(x, w, 1e-5, backend=backend), inputs, backend, dtype)


@dtypes
@backends("apply_rope")
@pytest.mark.parametrize("lead", [(2, 9), (5,)], ids=["batch", "flat"])
def test_apply_rope(lead, backend, dtype):
    angle = random(*lead, 6, seed=1, scale=5.0)
    compare(
        "apply_rope",
        lambda x, backend: ops.apply_rope(x, angle.cos(), angle.sin(), backend=backend),
        [random(*lead, 3, 12, dtype=dtype)],
        backend,
        dtype,
    )


@dtypes
@backends("attention")
@pytest.mark.parametrize(
    ("t", "s", "kv_heads", "masked", "causal"),
    [
        (9, 9, 4, False, True),  # training
        (70, 70, 2, False, True),  # training on more tokens than a block has, grouped heads
        (1, 13, 4, False, False),  # decode
        (5, 13, 2, False, True),  # a chunk of a prompt after a cached prefix, grouped heads
        (6, 6, 1, True, True),  # padding, one KV head
        (1, 8, 4, True, False),  # decode of sequences of different lengths
    ],
)
def test_attention(t, s, kv_heads, masked, causal, backend, dtype):
    q = random(2, 4, t, 16, dtype=dtype)
    k, v = (random(2, kv_heads, s, 16, dtype=dtype, seed=i) for i in (1, 2))
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, s, dtype=torch.bool)
        mask[1, ..., :3] = False  # with `causal`, the first queries of row 1 may attend to nothing
    compare(
        "attention",
        lambda q, k, v, backend: ops.attention(q, k, v, mask, causal=causal, backend=backend),
        [q, k, v],
        backend,
        dtype,
    )


@dtypes
@backends("isolated_attention")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [[9], [3, 3, 1, 5, 3], [2] * 9, [130, 7, 300, 64]], ids=str)
def test_isolated_attention(lengths, kv_heads, backend, dtype):
    q = random(sum(lengths), 4, 16, dtype=dtype)
    k, v = (random(sum(lengths), kv_heads, 16, dtype=dtype, seed=i) for i in (1, 2))
    compare(
        "attention",
        lambda q, k, v, backend: ops.isolated_attention(q, k, v, lengths, backend=backend),
        [q, k, v],
        backend,
        dtype,
    )


@pytest.mark.parametrize("lengths", [[3, 3], [8, -1], [7, 0], []])
def test_lengths_that_are_not_those_of_the_tokens(lengths):
    q = random(7, 2, 4)
    assert f"{lengths}" in refused(lambda: ops.isolated_attention(q, q, q, lengths))


@backends("route")
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("e", "k"), [(64, 8), (8, 8), (5, 1)])
def test_route(e, k, renormalise, backend):
    logits = random(21, e, scale=2.0)
    compare(
        "route", lambda x, backend: ops.route(x, k, renormalise, backend=backend)[0], [logits], backend, torch.float32
    )
    ours, theirs = (ops.route(logits, k, renormalise, backend=b)[1] for b in (backend, "reference"))
    assert torch.equal(ours, theirs)


@backends("sort_by_expert")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.reason)
def test_sort_by_expert(shape, backend):
    ours, theirs = (ops.sort_by_expert(routed(shape), shape.e, backend=b) for b in (backend, "reference"))
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert torch.equal(a, b), name


@dtypes
@backends("gather_rows")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.reason)
def test_gather_rows(shape, backend, dtype):
    rows = ops.sort_by_expert(routed(shape), shape.e)
    compare(
        "gather_rows",
        lambda x, backend: ops.gather_rows(x, rows, backend=backend),
        [random(shape.n, shape.d, dtype=dtype)],
        backend,
        dtype,
    )


@dtypes
@backends("combine")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.reason)
def test_combine(shape, backend, dtype):
    rows = ops.sort_by_expert(routed(shape), shape.e)
    inputs = [random(shape.n * shape.k, shape.d, dtype=dtype), random(shape.n, shape.k, seed=1).abs()]
    compare("combine", lambda y, w, backend: ops.combine(y, w, rows, backend=backend), inputs, backend, dtype)


@dtypes
@backends("experts")
@gradients
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.reason)
def test_experts(shape, gradients, backend, dtype, bf16_hardware):
    rows = ops.sort_by_expert(routed(shape), shape.e)
    inputs = [
        random(shape.n * shape.k, shape.d, dtype=dtype),
        random(shape.e, 2 * shape.f, shape.d, dtype=dtype, seed=1, scale=shape.d**-0.5),
        random(shape.e, shape.d, shape.f, dtype=dtype, seed=2, scale=shape.f**-0.5),
    ]
    compare(
        "experts",
        lambda x, gate_up, down, backend: ops.experts(x, rows.offsets_E, gate_up, down, F.silu, backend=backend),
        inputs,
        backend,
        dtype,
        gradients,
    )


@pytest.mark.parametrize("frozen", ["rows", "gate_up", "down", "rows and down", "both weights"])
def test_gradients_of_some_inputs_of_experts_only(frozen):
    """Frozen experts under adapters, or a first layer whose input needs no gradient."""
    shape = SHAPES[5]
    rows = ops.sort_by_expert(routed(shape), shape.e)
    gradients = {}
    for backend in ("reference", "torch"):
        leaves = {
            "rows": random(shape.n * shape.k, shape.d),
            "gate_up": random(shape.e, 2 * shape.f, shape.d, seed=1),
            "down": random(shape.e, shape.d, shape.f, seed=2),
        }
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen.replace("both weights", "gate_up and down"))
        x, gate_up, down = leaves.values()
        ops.experts(x, rows.offsets_E, gate_up, down, F.silu, backend=backend).square().sum().backward()
        gradients[backend] = {name: leaf.grad for name, leaf in leaves.items()}
    for name, expected in gradients["reference"].items():
        ours = gradients["torch"][name]
        assert (ours is None) == (expected is None), name
        if expected is not None:
            close(ours, expected, gradient_tolerance("experts", torch.float32), name)


@dtypes
@backends("moe")
@pytest.mark.parametrize("activation", [F.silu, F.gelu], ids=["silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.reason)
def test_moe(shape, activation, backend, dtype):
    """The whole block, non-contiguous input, another activation too."""
    if backend == "cpu" and activation is not F.silu:
        pytest.skip("the kernels compute silu only")
    ids = routed(shape)
    inputs = [
        random(shape.d, shape.n, dtype=dtype).T,
        random(shape.n, shape.k, seed=1).abs(),
        random(shape.e, 2 * shape.f, shape.d, dtype=dtype, seed=2, scale=shape.d**-0.5),
        random(shape.e, shape.d, shape.f, dtype=dtype, seed=3, scale=shape.f**-0.5),
    ]
    compare(
        "moe",
        lambda x, w, gate_up, down, backend: ops.moe(x, w, ids, gate_up, down, activation, backend=backend),
        inputs,
        backend,
        dtype,
    )


@dtypes
@backends("linear_cross_entropy")
@pytest.mark.parametrize(
    ("n", "ignored"),
    [
        (10, 3),
        (700, 1),  # more tokens than one part
        (5, 5),  # nothing to learn from: loss and gradients are zero, not NaN
    ],
)
def test_linear_cross_entropy(n, ignored, backend, dtype):
    labels = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(3))
    labels[:ignored] = -100
    compare(
        "linear_cross_entropy",
        lambda x, w, backend: ops.linear_cross_entropy(x, w, labels, backend=backend),
        [random(n, 24, dtype=dtype), random(50, 24, dtype=dtype, seed=1)],
        backend,
        dtype,
    )
