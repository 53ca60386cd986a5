"""A mixture split by experts: the parts' outputs and gradients add up to the whole mixture's.

Both ways: by the training kernels, and composed of operations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops import part
from olmoe.ops.cpu import training
from ops.cpu.matrices import error, random

N, E, K, D, HIDDEN = 50, 6, 3, 16, 12


@pytest.fixture(params=["kernels", "composed"])
def way(request, monkeypatch):
    """How the part is computed; the other way must not be used."""
    if request.param == "composed":
        monkeypatch.setattr(training, "takes", lambda *tensors, **indices: False)
    elif not training.takes(torch.ones(1, requires_grad=True)):
        pytest.skip("there are no kernels of training")
    else:
        monkeypatch.setattr(part, "_part", None)
    return request.param


def inputs(dtype=torch.float32):
    return [
        random(N, D).to(dtype).requires_grad_(),
        torch.rand(N, K, generator=torch.Generator().manual_seed(3)).requires_grad_(),
        random(E, 2 * HIDDEN, D, seed=1, scale=D**-0.5).to(dtype).requires_grad_(),
        random(E, HIDDEN, D, seed=2, scale=HIDDEN**-0.5).to(dtype).transpose(1, 2).requires_grad_(),
    ]


def chosen(among):
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.tensor(among)[torch.randperm(len(among), generator=generator)[:K]] for _ in range(N)])


def results(function, tensors):
    """The value and all gradients, for a random incoming gradient."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, random(*out.shape, seed=9).to(out.dtype))]


def summed(ids, cuts, activation=F.silu, **options):
    """The sum of the parts between consecutive cuts, each given only its own experts."""

    def function(x, weights, gate_up, down):
        ranges = list(zip(cuts, [*cuts[1:], E], strict=True))
        return sum(ops.moe_part(x, weights, ids, gate_up[a:b], down[a:b], activation, a, **options) for a, b in ranges)

    return function


def whole(ids, activation=F.silu, **options):
    return lambda x, w, gate_up, down: ops.moe(x, w, ids, gate_up, down, activation, **options)


@pytest.mark.parametrize(
    ("among", "cuts"),
    [
        pytest.param(range(E), (0, 3), id="halves"),
        pytest.param(range(E), (0, 1, 5), id="unequal parts"),
        pytest.param(range(E), (0,), id="one part is the whole"),
        pytest.param(range(3), (0, 3), id="nobody chose the second half"),
        pytest.param(range(3, 6), (0, 3), id="nobody chose the first half"),
    ],
)
def test_parts_add_up(among, cuts, way):
    ids, tensors = chosen(list(among)), inputs()
    ours = results(summed(ids, cuts), tensors)
    expected = results(whole(ids, backend="reference"), tensors)
    for mine, theirs in zip(ours, expected, strict=True):
        assert error(mine, theirs) < 5e-6


def test_a_single_part_equals_the_whole_bit_for_bit(way):
    ids, tensors = chosen(range(E)), inputs()
    if way == "composed":
        pytest.skip("the whole is computed by kernels")
    for mine, theirs in zip(results(summed(ids, (0,)), tensors), results(whole(ids), tensors), strict=True):
        assert torch.equal(mine, theirs)


def test_choices_of_other_parts_have_no_gradient(way):
    ids, (x, weights, gate_up, down) = chosen(range(E)), inputs()
    for _ in range(3):  # reused memory
        out = ops.moe_part(x, weights, ids, gate_up[2:4], down[2:4], F.silu, 2)
        _, grad = torch.autograd.grad(out.square().sum(), (x, weights))
        assert torch.equal(grad != 0, (ids >= 2) & (ids < 4))


@pytest.mark.parametrize("activation", [F.silu, F.gelu], ids=["silu", "gelu"])
@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=str)
def test_other_activations_and_products(activation, products):
    ids, tensors = chosen(range(E)), inputs()
    ours = results(summed(ids, (0, 2), activation, products=products), tensors)
    expected = results(whole(ids, activation, products=products, backend="reference"), tensors)
    for mine, theirs in zip(ours, expected, strict=True):
        assert error(mine, theirs) < (5e-6 if products is None else 2**-6)


def test_bf16_tensors_and_autocast():
    ids = chosen(range(E))
    expected = results(whole(ids, backend="reference"), inputs())
    half = results(summed(ids, (0, 2)), inputs(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(summed(ids, (0, 2)), inputs())
    for mine, lowered, theirs in zip(half, cast, expected, strict=True):
        assert error(mine.float(), theirs) < 2**-5
        assert error(lowered.float(), theirs) < 2**-5


@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_empty_batches(products, grad):
    ids, (x, weights, gate_up, down) = chosen(range(E)), inputs()
    with torch.set_grad_enabled(grad):
        out = ops.moe_part(x[:0], weights[:0], ids[:0], gate_up[:2], down[:2], F.silu, 0, products=products)
    assert out.shape == (0, D)
    if grad:
        assert not torch.autograd.grad(out.sum(), gate_up)[0].any()


def test_parts_add_up_without_gradients_too():
    ids, tensors = chosen(range(E)), inputs()
    with torch.no_grad():
        assert error(summed(ids, (0, 2))(*tensors), whole(ids, backend="reference")(*tensors)) < 2e-6


def test_second_derivatives():
    ids, tensors = chosen(range(E)), inputs()
    found = []
    for function in (summed(ids, (0, 3)), whole(ids, backend="reference")):
        first = torch.autograd.grad((function(*tensors) ** 2).sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), tensors))
    for mine, theirs in zip(*found, strict=True):
        assert error(mine, theirs) < 2e-5
