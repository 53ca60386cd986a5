"""Which sequences are generated together, so that many of them need no more memory than a few. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def waves(needs: Sequence[int], budget: int, most: int, unit: int = 1) -> Iterator[list[int]]:
    """Numbers of the sequences of each wave, the longest first, since a cache has room for its longest in every row.

    `needs` are the tokens that each sequence may grow to. A wave has at most `most` sequences, and its cache room for
    at most `budget` tokens, of which a sequence takes a multiple of `unit`, unless a single one needs more.
    """
    order = sorted(range(len(needs)), key=needs.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        count = max(1, min(most, budget // (-(-needs[order[start]] // unit) * unit)))
        yield order[start : start + count]
        start += count
