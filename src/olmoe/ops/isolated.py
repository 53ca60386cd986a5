"""Causal attention within each of several texts that lie end to end, such as the documents of a window or packed chats.

The kernels for training take all texts in one call. Elsewhere neighbours of the same length are computed together, as
whole windows are.

Shapes legend: N tokens of all texts, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from olmoe.ops.autocast import autocast_dtype
from olmoe.ops.cpu import causal as causal_kernels
from olmoe.ops.cpu import training
from olmoe.ops.dispatch import call, register


@register("isolated_attention", "torch", autocasts=True)
def isolated_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], products: torch.dtype | None) -> Tensor:
    """See `reference.isolated_attention`."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _run_by_run(q, k, v, lengths, products)

    by_kernels = training.takes(q, k, v) if products is None else training.takes_products(products, q, k, v)
    if by_kernels and autocast_dtype(q) is None and causal_kernels.fits(q, k, v):
        out = causal_kernels.attention(q, k, v, plain, products, lengths)
    else:
        out = plain(q, k, v)
    return out[0].transpose(0, 1)


def _run_by_run(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], products: torch.dtype | None) -> Tensor:
    """q (1, H, N, Dh), k and v (1, G, N, Dh) -> (1, H, N, Dh)."""
    runs = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for parts, (length, count) in zip(
        zip(*(t[0].split(sizes, dim=1) for t in (q, k, v)), strict=True), runs, strict=True
    ):
        texts = [t.unflatten(1, (count, length)).transpose(0, 1) for t in parts]
        if products is None:
            out = call("attention", "torch", *texts, None, True)
        else:
            out = call("lowered_attention", "torch", *texts, None, True, products)
        outputs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, dim=1).unsqueeze(0)
