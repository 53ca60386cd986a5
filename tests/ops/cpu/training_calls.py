"""Calls of the training kernels: inputs by size, and results of the forward and backward passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from olmoe import ops
from ops.cpu.matrices import random


def leaf(*shape, seed=0, scale=1.0):
    return random(*shape, seed=seed, scale=scale).requires_grad_()


def gradients(function, inputs, seed=9):
    """The value of `function`, and the gradients of `inputs` for a random incoming gradient."""
    out = function(*inputs)
    grad = random(max(out.numel(), 1), seed=seed).view(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad)


def doubled(inputs):
    """The same in double precision."""
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]


def chosen(n, e, k, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(n)])


def moe_inputs(n, e, k, d, f):
    weights = torch.rand(n, k, generator=torch.Generator().manual_seed(3)).requires_grad_()
    gate_up, down = leaf(e, 2 * f, d, seed=1, scale=d**-0.5), leaf(e, d, f, seed=2, scale=f**-0.5)
    return [leaf(n, d), weights, chosen(n, e, k), gate_up, down]


def moe(*inputs):
    return ops.moe(*inputs, F.silu)


def heads(batch, tokens, count, head_dim, seed=0, scale=1.0):
    """(B, H, T, Dh) in the memory layout that projections produce."""
    return random(batch, tokens, count, head_dim, seed=seed, scale=scale).transpose(1, 2).requires_grad_()


def attention(q, k, v):
    return ops.attention(q, k, v, causal=True)


def attention_inputs(batch, query_heads, kv_heads, tokens, head_dim, scale=1.0):
    q = heads(batch, tokens, query_heads, head_dim, scale=scale)
    return [q, *(heads(batch, tokens, kv_heads, head_dim, seed=i, scale=scale) for i in (1, 2))]


CALLS = {
    "linear": (ops.linear, lambda: [leaf(150, 96), leaf(300, 96, seed=1)]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), lambda: [leaf(300, 48), leaf(48, seed=1)]),
    "apply_rope": (
        lambda x, cos, sin: ops.apply_rope(x, cos, sin),
        lambda: [leaf(2, 90, 3, 10), random(90, 5, seed=1), random(90, 5, seed=2)],
    ),
    "attention": (attention, lambda: attention_inputs(2, 4, 2, 300, 32)),
    "isolated_attention": (
        lambda q, k, v: ops.isolated_attention(q, k, v, [70, 1, 300, 29]),
        lambda: [leaf(400, 4, 32), leaf(400, 2, 32, seed=1), leaf(400, 2, 32, seed=2)],
    ),
    "route": (lambda x: ops.route(x, 3)[0], lambda: [leaf(200, 9)]),
    "moe": (moe, lambda: moe_inputs(200, 8, 3, 48, 24)),
    "moe_part": (  # of the experts 2 to 7
        lambda x, w, ids, a, b: ops.moe_part(x, w, ids, a[2:], b[2:], F.silu, 2),
        lambda: moe_inputs(200, 8, 3, 48, 24),
    ),
    "linear_cross_entropy": (
        ops.linear_cross_entropy,
        lambda: [leaf(1100, 32), leaf(90, 32, seed=1), torch.arange(1100) % 90],
    ),
}
