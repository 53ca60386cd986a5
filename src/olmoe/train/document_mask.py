"""Isolates documents that lie end to end in a window: positions restart, and no token attends to another document.

OLMoE was trained without this: its attention crosses documents (`causal_attend`). With it, a window computes what its
documents would compute one by one, and attention takes less time the shorter the documents are.

Shapes legend: B windows, T positions, N tokens of all documents, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import Attend, causal_attend


def positions_and_attention(
    ids_BT: Tensor, eos_id: int | None, products: torch.dtype | None = None
) -> tuple[Tensor, Attend]:
    """The positions (B, T) and the attention for windows of ids, in which each document ends with `eos_id`.

    With None, windows are not divided: positions continue, and attention crosses documents. Attention multiplies what
    is rounded to `products`, if that is given.
    """
    if eos_id is None:
        attend = causal_attend if products is None else functools.partial(causal_attend, products=products)
        return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT), attend
    lengths = document_lengths(ids_BT, eos_id)
    counts = torch.tensor(lengths)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    positions = (torch.arange(ids_BT.numel()) - starts).view(ids_BT.shape)
    return positions.to(ids_BT.device), isolated_attend(lengths, products)


def document_lengths(ids_BT: Tensor, eos_id: int) -> list[int]:
    """Lengths of the documents in windows of ids, in order. One ends with `eos_id`, or where its window does."""
    ends_BT = ids_BT == eos_id
    ends_BT[:, -1] = True
    places = ends_BT.flatten().nonzero().flatten().cpu()
    return torch.diff(places, prepend=torch.tensor([-1])).tolist()


def isolated_attend(lengths: Sequence[int], products: torch.dtype | None = None) -> Attend:
    """Causal attention within each of several texts that lie end to end, of these `lengths`.

    Leading dimensions of what it is called with may be any that hold these tokens in order.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (..., H, Dh), k and v (..., G, Dh) -> (..., H, Dh)."""
        flat_q, flat_k, flat_v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
        return ops.isolated_attention(flat_q, flat_k, flat_v, lengths, products=products).view(q.shape)

    return attend
