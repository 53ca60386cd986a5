"""Packed modules against the network's own modules holding the decoded weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configurations import small_config
from olmoe.errors import UserError
from olmoe.model import Experts, Linear, activation
from olmoe.quant import FourBit, Int8, PackedEmbedding, PackedExperts, PackedLinear, make_format

FORMATS = [FourBit("nf4", True), FourBit("fp4"), Int8()]
named = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linears(format, bias=True):
    """A packed linear layer, and a plain one with the weight it decodes to."""
    packed, plain = PackedLinear(24, 10, bias, format), Linear(24, 10, bias=bias)
    packed.pack("weight", random(10, 24))
    plain.weight.data = packed.decode("weight", torch.float32)
    if bias:
        packed.bias.data = plain.bias.data = random(10, seed=1)
    return packed, plain


def experts(format):
    """Packed experts, and plain ones with the weights they decode to."""
    config = small_config(intermediate_size=5)  # odd: blocks of one expert end within a row
    e, d, f = config.num_experts, config.hidden_size, config.intermediate_size
    packed, plain = PackedExperts(e, d, f, activation("silu"), format), Experts(config)
    for i, (name, shape) in enumerate((("gate_up_proj", (e, 2 * f, d)), ("down_proj", (e, d, f)))):
        packed.pack(name, random(*shape, seed=i))
        decoded = torch.stack([packed.decode(name, torch.float32, expert) for expert in range(e)])
        getattr(plain, name).data = decoded
    return packed, plain


def routing(tokens=9, chosen=3, num_experts=8):
    weights, ids = random(tokens, num_experts).softmax(dim=-1).topk(chosen, dim=-1)
    return ids, weights


@named
def test_linear_multiplies_with_the_decoded_weight(format):
    packed, plain = linears(format)
    x = random(2, 3, 24)
    assert torch.allclose(packed(x), plain(x), atol=1e-5)


@named
def test_experts_compute_with_the_decoded_weights(format):
    packed, plain = experts(format)
    ids, weights = routing()
    x = random(9, 32)
    assert torch.allclose(packed(x, ids, weights), plain(x, ids, weights), atol=1e-4, rtol=1e-4)


@named
def test_gradients_reach_inputs_routing_and_bias_as_through_plain_modules(format):
    (packed, plain), (packed_experts, plain_experts) = linears(format), experts(format)
    ids, weights = routing()
    gradients = []
    for linear, mixture in ((packed, packed_experts), (plain, plain_experts)):
        x, y, w = random(4, 24).requires_grad_(), random(9, 32).requires_grad_(), weights.clone().requires_grad_()
        loss = linear(x).square().sum() + mixture(y, ids, w).square().sum()
        loss.backward()
        gradients.append((x.grad, y.grad, w.grad, linear.bias.grad))
    for ours, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_packed_weights_take_no_gradient_and_no_decoded_matrix_outlives_the_forward_pass():
    packed, _ = experts(FORMATS[0])
    ids, weights = routing()
    assert not any(p.requires_grad for p in packed.parameters())
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        packed(random(9, 32).requires_grad_(), ids, weights)
    assert kept
    assert (10, 32) not in kept
    assert (32, 5) not in kept


def test_only_chosen_experts_are_decoded(monkeypatch):
    packed, _ = experts(FORMATS[0])
    decoded = []
    decode = packed.decode
    monkeypatch.setattr(
        packed, "decode", lambda name, dtype, expert: decoded.append(expert) or decode(name, dtype, expert)
    )
    packed(random(3, 32), torch.tensor([[5, 1], [1, 5], [5, 6]]), torch.full((3, 2), 0.5))
    assert decoded == [1, 1, 5, 5, 6, 6]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, None], ids=str)
def test_compute_dtype_is_inside_and_the_input_dtype_outside(compute):
    packed = PackedLinear(24, 10, False, FORMATS[0], compute)
    packed.pack("weight", random(10, 24))
    x = random(6, 24).bfloat16()
    inner = compute or torch.bfloat16
    expected = nn.functional.linear(x.to(inner), packed.decode("weight", inner)).bfloat16()
    output = packed(x)
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), expected.float(), rtol=2**-7, atol=2**-7)


def test_no_tokens():
    packed, _ = experts(FORMATS[0])
    assert packed(random(0, 32), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3)).shape == (0, 32)


def test_state_dict_round_trip():
    packed, _ = experts(FORMATS[0])
    other = PackedExperts(8, 32, 5, activation("silu"), FORMATS[0])
    other.load_state_dict(packed.state_dict())
    ids, weights = routing()
    x = random(9, 32)
    assert torch.equal(other(x, ids, weights), packed(x, ids, weights))
    assert set(packed.state_dict()) == {
        f"{matrix}{part}"
        for matrix in ("gate_up_proj", "down_proj")
        for part in ("", "_absmax", "_nested_absmax", "_offset")
    }


def test_formats_by_name():
    assert [make_format(name).name for name in ("nf4", "fp4", "int8")] == ["nf4", "fp4", "int8"]
    assert make_format("nf4", True).double_quant
    with pytest.raises(UserError, match="'q9' is unknown"):
        make_format("q9")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("format", ["nf4", "int8", "q8_0", "q5_0", "q4_0"])
def test_vmap_over_ids_of_an_embedding(format, backend):
    """`vmap` cannot say which rows are asked for."""
    embedding = PackedEmbedding(32, 64, make_format(format), torch.bfloat16)
    embedding.pack("weight", random(32, 64))
    embedding.backend = backend
    ids = torch.tensor([[0, 3, 31], [7, 7, 1]])
    found = torch.vmap(embedding)(ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, embedding(ids))
