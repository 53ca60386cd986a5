"""Several examples in one row, isolated: positions restart, and no token attends to another example.

Rows are filled by best fit: the longest example first, each into the fullest row that has room. A row's examples run
through the network end to end, without padding, and attention is computed for each of them alone (`isolated_attend` of
`document_mask`), so that a packed run computes what it would compute of single examples.

Shapes legend: N tokens of all examples of a batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from olmoe.model import Attend, CausalLM
from olmoe.train.document_mask import isolated_attend
from olmoe.train.finetune.masks import Example


@dataclass(frozen=True)
class Batch:
    """Examples end to end: ids, their positions and labels (N,), and the length of each example."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """The batch of these examples."""
        lengths = [len(example.inputs) for example in examples]
        ids, positions, labels = (
            torch.from_numpy(np.concatenate(parts)).to(device)
            for parts in (
                [example.inputs for example in examples],
                [np.arange(length) for length in lengths],
                [example.labels for example in examples],
            )
        )
        return cls(ids, positions, labels, lengths)

    def attention_for(self, model: CausalLM) -> Attend:
        """Attention within each example, which multiplies as the products of `model` do (`set_products`)."""
        return isolated_attend(self.lengths, getattr(model.lm_head, "products", None))  # a packed head has none


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of examples, row by row, so that no row's lengths exceed `capacity`: best fit, longest first.

    Of equally long examples the first comes first.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by the room that they have
    rooms: list[int] = []  # the sizes of room that there are, sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        assert 0 < length <= capacity, number
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(number)
        if room > length:
            if room - length not in open_rows:
                open_rows[room - length] = []
                bisect.insort(rooms, room - length)
            open_rows[room - length].append(row)
    return rows
