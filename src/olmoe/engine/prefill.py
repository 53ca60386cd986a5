"""Prompts through the network, long ones in pieces.

Shapes legend: B sequences, N tokens of all prompts end to end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from olmoe.engine.kv_cache import KVCache
from olmoe.model import CausalLM

# Tokens of a piece: every expert of the released shapes gets 64 of them on average, enough for full speed, and what a
# layer computes on the way takes 0.1 GB.
PIECE_TOKENS = 512
# Without those kernels a prompt goes through as a whole, with others only up to so many tokens.
WHOLE_TOKENS = 4096


def prefill(model: CausalLM, cache: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """All prompts end to end through the network -> logits (B, V) of each prompt's last token.

    `cache` is empty at first and holds the prompts afterwards. Where it `continues` (with the C++ kernels), no more
    than `PIECE_TOKENS` go through at once: memory for activations then does not grow with the prompt, and Ctrl-C is
    heard between two pieces. Elsewhere memory grows with the longest prompt, but not with their number. No prompt may
    be empty.
    """
    device, lengths = model.model.norm.weight.device, [len(prompt) for prompt in prompts]
    lengths_B = torch.tensor(lengths, device=device)
    ids_N = torch.tensor([i for prompt in prompts for i in prompt], device=device)
    positions_N = torch.cat([torch.arange(length, device=device) for length in lengths])
    length_N = torch.repeat_interleave(lengths_B, lengths_B)
    start, left, last = 0, lengths, []
    for counts in pieces(lengths, PIECE_TOKENS) if cache.continues else whole(lengths, WHOLE_TOKENS):
        piece = slice(start, start + sum(counts))
        attend = cache.attend_prefill(counts)
        hidden = model(ids_N[piece], positions_N[piece], attend, length_N[piece]).hidden
        cache.advance(counts)
        start, left = piece.stop, [n - count for n, count in zip(left, counts, strict=True)]
        ends = torch.tensor(counts, device=device).cumsum(0) - 1
        finished = [row for row, count in enumerate(counts) if count and not left[row]]
        last.append(hidden[ends[finished]])
    return model.logits(torch.cat(last))


def pieces(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Tokens of each sequence in each piece: `size` in all but the last, one sequence after the other."""
    left = list(lengths)
    while any(left):
        room, counts = size, []
        for length in left:
            counts.append(min(length, room))
            room -= counts[-1]
        left = [length - count for length, count in zip(left, counts, strict=True)]
        yield counts


def whole(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """As `pieces`, but of whole sequences: as many as `size` tokens allow, and at least one."""
    counts = [0] * len(lengths)
    for row, length in enumerate(lengths):
        if any(counts) and sum(counts) + length > size:
            yield counts
            counts = [0] * len(lengths)
        counts[row] = length
    if any(counts):
        yield counts
