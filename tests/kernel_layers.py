"""One decoder layer, plain and through the kernels, side by side."""

from __future__ import annotations

import copy

import torch

from olmoe.hf.kernel_layer import KernelDecoderLayer, inputs_fit
from olmoe.model import DecoderLayer, causal_attend

WIDTH = 32


def through_kernels(model):
    """Make the decoder layers of the plain network those of the transformers face, which use the kernels."""
    for module in model.modules():
        if type(module) is DecoderLayer:
            module.__class__ = KernelDecoderLayer


def plain(model):
    """The opposite."""
    for module in model.modules():
        if type(module) is KernelDecoderLayer:
            module.__dict__.pop("_view", None)
            module.__class__ = DecoderLayer


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(q, k, v, layer):
    """Attention within a batch (B, T, ...), or within flat tokens (N, ...)."""
    if q.dim() == 4:
        return causal_attend(q, k, v, layer)
    return causal_attend(*(t.unsqueeze(0) for t in (q, k, v)), layer)[0]


def rotations(model, x):
    return model.model.rotary(torch.arange(x.shape[-2]).expand(x.shape[:-1]))


def run(model, x, layer=0, **options):
    """One layer of `model` on x (..., T, D): its output and what its router decided."""
    with torch.inference_mode():
        return model.model.layers[layer](x, rotations(model, x), options.get("attend", attend))


def fits(model, x, layer=0):
    """Whether the kernels take this call."""
    rope = rotations(model, x)
    return inputs_fit(x, rope) and model.model.layers[layer].current(x) is not None


def both(model, x, **options):
    """The plain layer's results and those through the kernels, from copies of `model`."""
    other, ours = copy.deepcopy(model), copy.deepcopy(model)
    plain(other)
    through_kernels(ours)
    with torch.inference_mode():
        assert fits(ours, x)
    return run(other, x, **options), run(ours, x, **options)


def same(expected, ours, tolerance):
    """Outputs within `tolerance` of their largest, the same experts, and weights that follow."""
    (y, routed), (y_ours, routed_ours) = expected, ours
    assert y_ours.shape == y.shape
    assert y_ours.dtype == y.dtype
    assert [t.shape for t in routed_ours] == [t.shape for t in routed]
    assert [t.dtype for t in routed_ours] == [t.dtype for t in routed]
    assert torch.equal(routed_ours.expert_ids, routed.expert_ids)
    for left, right in ((y_ours, y), (routed_ours.logits, routed.logits), (routed_ours.weights, routed.weights)):
        assert (left.float() - right.float()).abs().max() <= tolerance * right.float().abs().max()
