"""One decoder layer, plain and fused, side by side."""

from __future__ import annotations

import copy

import torch

from olmoe import fused
from olmoe.model import causal_attend

WIDTH = 32


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
    return model.model.layers[layer]._fitting(x, rotations(model, x)) is not None


def both(model, x, **options):
    """The plain layer's results and the fused one's, from copies of `model`."""
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    fused.unfuse(plain)
    fused.fuse(ours)
    with torch.inference_mode():
        assert fits(ours, x)
    return run(plain, x, **options), run(ours, x, **options)


def same(plain, ours, tolerance):
    """Outputs within `tolerance` of their largest, the same experts, and weights that follow."""
    (y, routed), (y_ours, routed_ours) = plain, ours
    assert y_ours.shape == y.shape
    assert y_ours.dtype == y.dtype
    assert [t.shape for t in routed_ours] == [t.shape for t in routed]
    assert [t.dtype for t in routed_ours] == [t.dtype for t in routed]
    assert torch.equal(routed_ours.expert_ids, routed.expert_ids)
    for left, right in ((y_ours, y), (routed_ours.logits, routed.logits), (routed_ours.weights, routed.weights)):
        assert (left.float() - right.float()).abs().max() <= tolerance * right.float().abs().max()
