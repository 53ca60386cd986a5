"""fp32 inputs with frozen half-precision weights: the results of fp32 weights without an fp32 copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from olmoe import ops
from olmoe.ops import widened


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Largest(TorchDispatchMode):
    """The largest fp32 tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 256, 700])  # less than one part of the weight, one, several and a remainder
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
def test_linear(rows, dtype, bias, backend):
    weight, x = values(rows, 48).to(dtype), values(2, 9, 48, seed=1).requires_grad_(True)
    offset = values(rows, seed=2).to(dtype) if bias else None
    y = ops.linear(x, weight, offset, backend=backend)
    (grad,) = torch.autograd.grad(y, x, values(*y.shape, seed=3))
    wide = ops.linear(x, weight.float(), None if offset is None else offset.float(), backend="reference")
    (expected,) = torch.autograd.grad(wide, x, values(*y.shape, seed=3))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, wide, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear(x, weight, offset, backend=backend), wide, rtol=1e-5, atol=1e-5)


def test_a_trained_weight_has_its_gradient():
    weight = values(5, 8).bfloat16().requires_grad_(True)
    ops.linear(values(3, 8), weight, backend="torch").sum().backward()
    torch.testing.assert_close(weight.grad.float(), values(3, 8).sum(0).expand(5, 8), rtol=1e-2, atol=1e-2)


def test_gradients_can_be_differentiated_again():
    weight, x = values(5, 8).bfloat16(), values(3, 8).requires_grad_(True)
    y = ops.linear(x, weight, backend="torch").square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    wide = weight.float()
    torch.testing.assert_close(second, (2 * wide.T @ wide).sum(0).expand(3, 8))


def test_no_copy_of_the_weight_exists():
    weight, x = values(4096, 64).bfloat16(), values(4, 64).requires_grad_(True)
    labels = torch.tensor([1, 2, 3, 4])
    with Largest() as seen:
        ops.linear(x, weight, backend="torch").sum().backward()
        ops.linear_cross_entropy(x, weight, labels, backend="torch").backward()
    assert 0 < seen.numel <= max(widened.CONVERT_ROWS * 64, 4 * 4096) < weight.numel()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_experts(backend):
    gate_up, down = values(5, 12, 16).bfloat16(), values(5, 16, 6, seed=1).bfloat16()
    ids, weights = torch.tensor([[0, 3], [3, 4], [4, 0]]), torch.full((3, 2), 0.5)  # experts 1 and 2 have no rows
    x, other = (values(3, 16, seed=2).requires_grad_(True) for _ in range(2))
    y = ops.moe(x, weights, ids, gate_up, down, F.silu, backend=backend)
    expected = ops.moe(other, weights, ids, gate_up.float(), down.float(), F.silu, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(
            ops.moe(x, weights, ids, gate_up, down, F.silu, backend=backend), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy_with_a_frozen_head(dtype):
    head, labels = values(600, 24, seed=1).to(dtype), torch.randint(0, 600, (530,))  # more tokens than one part
    labels[:7] = -100
    x, other = (values(530, 24).requires_grad_(True) for _ in range(2))
    loss = ops.linear_cross_entropy(x, head, labels)
    expected = ops.linear_cross_entropy(other, head.float(), labels, backend="reference")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)
