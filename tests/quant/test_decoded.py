"""A packed matrix seen as an ordinary tensor: lazy, equal to what was decoded, and read-only."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from olmoe.errors import UserError
from olmoe.quant import FORMATS, PackedExperts, PackedLinear, make_format
from olmoe.quant.decoded import DecodedWeight

every_format = pytest.mark.parametrize("format", FORMATS)


def linear(format):
    torch.manual_seed(0)
    module = PackedLinear(64, 48, False, make_format(format))
    module.pack("weight", torch.randn(48, 64))
    return module


def experts(format):
    torch.manual_seed(0)
    module = PackedExperts(3, 64, 32, F.silu, make_format(format))
    for name, shape in (("gate_up_proj", (3, 64, 64)), ("down_proj", (3, 64, 32))):
        module.pack(name, torch.randn(shape))
    return module


@every_format
def test_it_is_the_decoded_matrix(format):
    module = linear(format)
    weight, expected = DecodedWeight(module, "weight"), module.decode("weight", torch.float32)
    assert weight.shape == (48, 64)
    assert (weight.dtype, weight.device, weight.requires_grad) == (torch.float32, expected.device, False)
    x = torch.randn(5, 64)
    for of in (
        lambda w: w.clone(),
        lambda w: w + 1,
        lambda w: x @ w.T,
        lambda w: F.linear(x, w),
        lambda w: w.data.norm(dim=1),
        lambda w: w.T.reshape(-1),
        lambda w: w.view(-1)[5:9],
        lambda w: torch.cat(w.chunk(3)[1:]),
        lambda w: w[[1, 4]],
        lambda w: torch.linalg.svdvals(w),
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: copy.deepcopy(w),
        lambda w: w.detach().to(torch.bfloat16),
    ):
        torch.testing.assert_close(of(weight).clone(), of(expected), rtol=1e-5, atol=1e-5)


@every_format
def test_a_stack_is_decoded_expert_by_expert(format):
    module = experts(format)
    weight = DecodedWeight(module, "down_proj")
    assert weight.shape == (3, 64, 32)
    for e in range(3):
        assert torch.equal(weight[e].clone(), module.decode("down_proj", torch.float32, e))


def test_nothing_is_decoded_before_something_computes(monkeypatch):
    module = experts("q4_0")
    monkeypatch.setattr(PackedExperts, "decode", lambda *args: pytest.fail("decoded"))
    weight = DecodedWeight(module, "gate_up_proj")
    assert weight.mT.shape == (3, 64, 64)
    assert "q4_0" in repr(weight)
    assert [part.shape[-1] for part in weight.data.split(16, dim=-1)] == [16] * 4


def test_gradients_reach_the_other_factor():
    module = linear("nf4")
    x = torch.randn(5, 64, requires_grad=True)
    F.linear(x, DecodedWeight(module, "weight")).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    F.linear(expected, module.decode("weight", torch.float32)).square().sum().backward()
    assert torch.equal(x.grad, expected.grad)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.add_(1),
        lambda w: setattr(w, "data", torch.zeros(48, 64)),
        lambda w: w.data.view(-1).scatter_add_(0, torch.tensor([1]), torch.ones(1)),
        lambda w: w.T.copy_(torch.zeros(64, 48)),
        lambda w: w.__setitem__(3, 0.0),
        lambda w: w[3].zero_(),
        lambda w: w.chunk(2)[1].zero_(),
        lambda w: w.requires_grad_(),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch.nn.init.normal_(w),
    ],
)
def test_writing_is_refused(write):
    module = linear("int8")
    before = module.weight.clone()
    with pytest.raises(UserError, match=r"weight is packed as int8 and cannot be changed.*; call dequantize\(\)"):
        write(DecodedWeight(module, "weight"))
    assert torch.equal(module.weight, before)


def test_its_dtype_is_that_of_the_model():
    module = linear("q8_0")
    norm = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    module.plain = (norm,)
    assert DecodedWeight(module, "weight").dtype == torch.bfloat16
    norm.data = norm.data.float()  # as `prepare_model_for_kbit_training` does
    assert DecodedWeight(module, "weight").clone().dtype == torch.float32
