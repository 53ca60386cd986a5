"""Unusual inputs of the training kernels: other types, layouts and numbers, few rows, large stacks.

The kernels take addresses and check nothing, so anything they would misread must be caught before.
"""

from __future__ import annotations

import math
import mmap
import sys

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops.cpu import extension, training
from ops.cpu.matrices import error, random
from ops.cpu.training_calls import CALLS, chosen, gradients, leaf, moe, moe_inputs

# Which inputs of a call have one row per token.
ROWS = {"linear": (0,), "rms_norm": (0,), "apply_rope": (0,), "moe": (0, 1, 2), "linear_cross_entropy": (0, 2)}


def by_torch(monkeypatch, function, inputs):
    """The same without the kernels."""
    with monkeypatch.context() as patched:
        patched.setattr(training, "takes", lambda *tensors, **indices: False)
        return gradients(function, inputs)


def floats(inputs):
    return [i for i, t in enumerate(inputs) if t.is_floating_point()]


# Other types. The kernels would read four bytes per number, whatever the type.

OTHER_TYPES = [torch.uint8, torch.int64, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", OTHER_TYPES, ids=str)
@pytest.mark.parametrize("name", ["apply_rope", "moe", "linear_cross_entropy"])
def test_inputs_of_other_dtypes_are_read_correctly(name, dtype):
    function, make = CALLS[name]
    inputs = make()
    other = {"apply_rope": 1, "moe": 1, "linear_cross_entropy": 0}[name]
    inputs[other] = torch.ones_like(inputs[other]).to(dtype)
    expected = [torch.ones_like(t, dtype=torch.float32) if i == other else t for i, t in enumerate(inputs)]
    found = function(*inputs)
    found = found.real if found.is_complex() else found
    assert error(found.detach(), function(*expected).detach()) < 2e-6


@pytest.mark.parametrize("dtype", OTHER_TYPES, ids=str)
@pytest.mark.parametrize("position", [0, 2], ids=["inputs", "bias"])
def test_products_of_other_dtypes_are_refused_like_torchs(dtype, position):
    inputs = [random(4, 16), leaf(8, 16), random(8)]
    inputs[position] = torch.ones_like(inputs[position]).to(dtype)
    with pytest.raises(RuntimeError, match="dtype|expected scalar type|Double|Float"):
        F.linear(*inputs)
    with pytest.raises(RuntimeError, match="dtype|expected scalar type|Double|Float"):
        ops.linear(*inputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["moe", "linear_cross_entropy"])
def test_indices_may_have_any_integer_type(name, dtype):
    function, make = CALLS[name]
    inputs = make()
    expected = gradients(function, inputs)
    assert training.takes(*inputs[:2], indices=inputs[2].to(dtype))
    found = gradients(function, [*inputs[:2], inputs[2].to(dtype), *inputs[3:]])
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_non_integer_indices_are_left_to_torch():
    x, weight = leaf(4, 16), leaf(8, 16)
    for dtype in (torch.float32, torch.bool):
        assert not training.takes(x, weight, indices=torch.zeros(4, dtype=dtype))


def test_more_rows_than_fit_in_32_bits_are_left_to_torch():
    x, ids = leaf(4, 16), torch.zeros(1, 1, dtype=torch.long)
    assert training.takes(x, indices=ids.expand(2**11, 2**20 - 1))
    assert not training.takes(x, indices=ids.expand(2**11, 2**20))


def test_labels_with_extra_dimensions_are_refused():
    """Labels of the wrong tokens would be used."""
    with pytest.raises(AssertionError):
        ops.linear_cross_entropy(leaf(4, 16), leaf(8, 16), torch.zeros(4, 2, dtype=torch.long))


# Other layouts.


def spread(t):
    """The same numbers in every second column of a wider tensor."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), -77, dtype=t.dtype)
    wide[..., ::2] = t.detach()
    return wide[..., ::2]


def turned(t):
    """The same numbers, with the last dimension varying slowest in memory."""
    return t.detach().movedim(-1, 0).contiguous().movedim(0, -1)


def shifted(t):
    """The same numbers, starting one number past an aligned address."""
    memory = torch.full((t.numel() + 1,), -77, dtype=t.dtype)
    memory[1:] = t.detach().flatten()
    return memory[1:].view(t.shape)


@pytest.mark.parametrize("layout", [spread, turned, shifted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_memory_layouts_change_nothing(name, layout):
    function, make = CALLS[name]
    inputs = make()
    expected = gradients(function, inputs)
    others = [layout(t).requires_grad_(t.requires_grad) for t in inputs]
    assert all(torch.equal(a, b) for a, b in zip(others, inputs, strict=True))
    out = function(*others)
    grad = layout(random(max(out.numel(), 1), seed=9).view(out.shape)) if out.dim() else random(1, seed=9).view(())
    found = torch.autograd.grad(out, [t for t in others if t.requires_grad], grad)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1], strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_an_expanded_scalar_gradient(name):
    """The gradient of a sum has memory for one number only."""
    function, make = CALLS[name]
    inputs = make()
    wanted = [t for t in inputs if t.requires_grad]
    out = function(*inputs)
    found = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    expected = torch.autograd.grad(out, wanted, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Numbers that are not finite.


def with_value(make, i, place, value):
    inputs = make()
    with torch.no_grad():
        inputs[i].view(-1)[place] = value
    return inputs


def lost(result):
    """Where the value and the gradients of a call are not finite."""
    return [~torch.isfinite(t) for t in (result[0], *result[1])]


@pytest.mark.parametrize("name", ROWS)
def test_nonfinite_values_reach_exactly_what_depends_on_them(name, monkeypatch, isa):
    """NaN goes exactly where torch lets it go. There, infinities may become NaN, or zero where a gate is closed."""
    if isa == "scalar":
        pytest.skip("left to torch")
    function, make = CALLS[name]
    for i in floats(make()):
        for place in (0, -1):
            reached = lost(gradients(function, with_value(make, i, place, math.nan)))
            by_nan = by_torch(monkeypatch, function, with_value(make, i, place, math.nan))
            assert all(torch.equal(a, b) for a, b in zip(reached, lost(by_nan), strict=True)), (i, place)
            for value in (math.nan, math.inf, -math.inf):
                ours = gradients(function, with_value(make, i, place, value))
                theirs = by_torch(monkeypatch, function, with_value(make, i, place, value))
                for most, mine, expected in zip(reached, (ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
                    finite = torch.isfinite(mine)
                    assert (finite | most).all(), (i, place)
                    assert name == "moe" or torch.isfinite(expected[finite]).all(), (i, place)
                    both = finite & torch.isfinite(expected)
                    assert error(mine[both], expected[both]) < 5e-6, (i, place)


@pytest.mark.skipif(
    not (extension.available() and extension.kernels().has_bf16_products()),
    reason="this CPU has no instruction for products in bf16",
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38], ids=str)
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_bf16_products_are_nonfinite_where_rounded_factors_make_them_so(place, value):
    """Odd depths, whose last pair has one number, and a number that rounds to infinity."""
    x, weight, grad = random(7, 257), random(65, 257, seed=1), random(7, 65, seed=9)
    x.view(-1)[place], weight.view(-1)[place] = value, 2.0
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    out = ops.linear(*leaves, products=torch.bfloat16)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    x, weight, grad = (t.bfloat16().float() for t in (x, weight, grad))
    for mine, expected in zip(found, (x @ weight.T, grad @ weight, grad.T @ x), strict=True):
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(mine), finite)
        assert error(mine[finite], expected[finite]) < 2e-6


@pytest.mark.parametrize("width", [8, 21])  # full vectors, and a remainder
@pytest.mark.parametrize("gate", [-87.0, -89.0, -1e4, -1e20, -1e38])
def test_gates_far_below_zero_have_zero_gradients(gate, width, isa):
    """silu and its derivative vanish there, however large the number they are multiplied by."""
    x = torch.full((3, 1), 1.0, requires_grad=True)
    gate_up = torch.cat((torch.full((1, width, 1), gate), torch.ones(1, width, 1)), dim=1).requires_grad_()
    down = torch.ones(1, 1, width, requires_grad=True)
    out, grads = gradients(moe, [x, torch.ones(3, 1, requires_grad=True), torch.zeros(3, 1).long(), gate_up, down])
    assert out.abs().max() < 1e-30
    for grad in grads:
        assert grad.abs().max() < 1e-30


# Few rows, many threads.


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ROWS)
def test_more_threads_than_rows(name, n, team, set_threads):
    function, make = CALLS[name]
    inputs = make()
    few = [t[:n] if i in ROWS[name] else t for i, t in enumerate(inputs)]
    few = [t.detach().clone().requires_grad_(t.requires_grad) for t in few]
    results = []
    for threads in (1, 16):
        set_threads(threads)
        results.append(gradients(function, few))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("used", [(0,), (5,), (2, 3)], ids=["the first", "the last", "between others"])
def test_only_some_experts_have_rows(used, monkeypatch):
    inputs = moe_inputs(40, 6, 1, 20, 9)
    inputs[2] = torch.tensor(used)[chosen(40, len(used), 1)]
    ours, theirs = gradients(moe, inputs), by_torch(monkeypatch, moe, inputs)
    assert error(ours[0], theirs[0]) < 2e-6
    assert all(error(a, b) < 5e-6 for a, b in zip(ours[1], theirs[1], strict=True))


# Sizes that do not fit into 32 bits.


def untouched(*shape):
    """Zeros that take no memory until written."""
    no_reserve = 0x4000  # Linux; Python has a name for it from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 4 * math.prod(shape), flags=flags), dtype=torch.float32).view(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for memory that it does not have")
def test_stacks_with_more_numbers_than_fit_in_32_bits():
    """26 GB of experts, of which only the first and the last are ever written or read."""
    d, f = 1024, 512
    count = 2**31 // (d * f) + 5
    gate_up, down = untouched(count, 2 * f, d), untouched(count, d, f)
    few = leaf(2, 2 * f, d, seed=1, scale=d**-0.5).detach(), leaf(2, d, f, seed=2, scale=f**-0.5).detach()
    for whole, part in zip((gate_up, down), few, strict=True):
        assert (count - 1) * part[0].numel() > 2**31
        whole[[0, -1]] = part
    x, weights, ids = leaf(5, d), leaf(5, 2, seed=3), chosen(5, 2, 2)
    expected = gradients(moe, [x, weights, ids, *few])
    found = gradients(moe, [x, weights, torch.tensor([0, count - 1])[ids], gate_up, down])
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert extension.isa() == "scalar" or training.takes(x, gate_up, down)
