"""Adapted experts as one step of training: what autograd makes of the same formulas, and what exists meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapter_cases import random_adapter
from conftest import make_model
from olmoe import adapters, ops
from olmoe.adapters import experts as module
from olmoe.adapters.experts import outputs_unneeded
from olmoe.model import set_backend
from olmoe.quant import PackedModule
from olmoe.train import recompute
from olmoe.weights import export
from olmoe.weights.checkpoint import open_source
from olmoe.weights.frozen import load_frozen
from packed_folders import WHOLE, decoded


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(tmp_path, format, precision=None, dtype=torch.float32):
    """The experts of a layer over weights in `format`, with an adapter, and the weights as they decode."""
    export.save(make_model(**WHOLE), tmp_path / "start", dtype=dtype)
    model = load_frozen(open_source(tmp_path / "start"), format)
    plain = decoded(model).model.layers[0].mlp.experts
    adapters.adapt(model, random_adapter(model.config), precision)
    set_backend(model, "torch")
    return model.model.layers[0].mlp.experts, plain


def written_out(experts, plain, x, ids, weights):
    """What the experts compute, in plain tensor code."""
    y = torch.zeros_like(x)
    for n in range(len(x)):
        for e, weight in zip(ids[n].tolist(), weights[n], strict=True):
            stacks = {}
            for name in ("gate_up_proj", "down_proj"):
                a, b = (experts.get_parameter(f"{name}_{factor}")[e] for factor in "ab")
                stacks[name] = getattr(plain, name)[e].detach() + experts.scale * (b @ a)
            gate, up = (stacks["gate_up_proj"] @ x[n]).chunk(2)
            y = y.index_add(0, torch.tensor([n]), (weight * (stacks["down_proj"] @ (F.silu(gate) * up))).unsqueeze(0))
    return y


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("x_needs_gradient", [True, False])  # nothing trained stands before the first experts
def test_gradients_are_those_of_autograd(tmp_path, format, x_needs_gradient):
    experts, plain = adapted(tmp_path, format)
    x = random(9, experts.base.hidden_dim, seed=1).requires_grad_(x_needs_gradient)
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    ids = torch.tensor([[0, 3], [3, 5], [5, 0], [0, 5], [3, 0], [5, 3], [0, 3], [3, 5], [0, 5]])  # 1, 2, ... have none
    wanted = [t for t in (x, weights, *experts.parameters()) if t.requires_grad]
    y, expected = experts(x, ids, weights), written_out(experts, plain, x, ids, weights)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    out = random(*y.shape, seed=3)
    for one, other in zip(torch.autograd.grad(y, wanted, out), torch.autograd.grad(expected, wanted, out), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_half_precision_weights_stay_what_they_are(tmp_path):
    experts, plain = adapted(tmp_path, None, dtype=torch.bfloat16)
    assert experts.base.gate_up_proj.dtype == torch.bfloat16
    x, ids = random(6, experts.base.hidden_dim).requires_grad_(True), torch.tensor([[0, 1]] * 6)
    weights = torch.full((6, 2), 0.5)
    y, expected = experts(x, ids, weights), written_out(experts, plain, x, ids, weights)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (one,), (other,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_products_in_bf16_are_close_and_rounded(tmp_path, format):
    experts, plain = adapted(tmp_path, format, torch.bfloat16)
    x, ids, weights = random(6, experts.base.hidden_dim), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    y, expected = experts(x, ids, weights), written_out(experts, plain, x, ids, weights)
    assert y.dtype == torch.float32
    off = (y - expected).norm() / expected.norm()
    assert 1e-4 < off < 2e-2
    with torch.no_grad():  # as in evaluation, which computes the same
        assert torch.equal(experts(x, ids, weights), y)


def test_experts_without_an_adapter_have_its_precision():
    model = make_model(**WHOLE)
    x, ids, weights = random(6, model.config.hidden_size), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    expected = model.model.layers[0].mlp.experts(x, ids, weights)
    adapters.adapt(model, random_adapter(model.config, ("attention",)), torch.bfloat16)
    set_backend(model, "torch")
    y = model.model.layers[0].mlp.experts(x, ids, weights)
    assert 1e-4 < (y - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("targets", [("attention", "experts"), ("attention",)])
def test_matrices_are_decoded_once_each_way(tmp_path, monkeypatch, targets):
    """Also where the layer is computed again: that ends before the experts."""
    export.save(make_model(**WHOLE), tmp_path / "start")
    model = load_frozen(open_source(tmp_path / "start"), "nf4")
    adapters.adapt(model, random_adapter(model.config, targets))
    set_backend(model, "torch")
    for layer in model.model.layers:
        recompute.wrap(layer, "full")
    seen, original = [], PackedModule.decode

    def decode(self, name, dtype, expert=None):
        if expert is not None:
            seen.append((id(self), name, expert))
        return original(self, name, dtype, expert)

    monkeypatch.setattr(PackedModule, "decode", decode)
    ids = torch.arange(40)

    def attend(q, k, v, layer):
        return ops.attention(*(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), causal=True)[0].transpose(0, 1)

    out = model(ids, ids, attend)
    forward = list(seen)
    assert forward
    assert len(set(forward)) == len(forward)
    seen.clear()
    out.hidden.square().sum().backward()
    assert sorted(seen) == sorted(forward)


def test_gradients_with_and_without_recomputation_are_the_same_bits(tmp_path):
    found = []
    for wrapped in (False, True):
        model = make_model(**WHOLE)
        adapters.adapt(model, random_adapter(model.config))
        set_backend(model, "torch")
        for layer in model.model.layers if wrapped else ():
            recompute.wrap(layer, "full")
        ids = torch.arange(40)

        def attend(q, k, v, layer):
            return ops.attention(*(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), causal=True)[0].transpose(0, 1)

        model(ids, ids, attend).hidden.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_mark_of_recomputation_is_taken_back():
    def fail():
        with outputs_unneeded():
            assert module._RECOMPUTATION.unneeded
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not module._RECOMPUTATION.unneeded
