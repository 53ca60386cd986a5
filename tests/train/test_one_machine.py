"""Messages through shared memory are those of the group's own collectives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olmoe.train import one_machine
from olmoe.train.one_machine import SharedMemory
from olmoe.train.ranks import join_ranks
from rank_processes import on_ranks

CAPACITY = 4096


def largest_differences(count: int) -> list[float]:
    """Of parts of `count` numbers, several messages in turn: this rank's against those of gloo."""
    with join_ranks("cpu") as ranks:
        memory = SharedMemory.of(dist.group.WORLD, CAPACITY)
        assert memory is not None
        generator = torch.Generator().manual_seed(ranks.rank)
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            own = torch.randn(count, generator=generator).to(dtype)
            ours, theirs = (torch.full((ranks.size * count,), torch.nan, dtype=dtype) for _ in range(2))
            memory.gather(ours, own)
            dist.all_gather_single(theirs, own)
            found.append((ours - theirs).abs().max().item())
            values = torch.randn(ranks.size * count, generator=generator)
            summed, reference = torch.full((count,), torch.nan), values.clone()
            memory.reduce(summed, values)
            dist.all_reduce(reference)
            found.append((summed - reference.view(ranks.size, -1)[ranks.rank]).abs().max().item())
        return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("count", [1, 1000, 5000])  # less than a slot, several
def test_messages_are_those_of_the_group(ranks, count):
    before = set(one_machine.FOLDER.iterdir())
    for differences in on_ranks(ranks, largest_differences, count):
        assert differences == pytest.approx([0.0] * 6, abs=1e-6)
    assert not {f for f in set(one_machine.FOLDER.iterdir()) - before if f.name.startswith("olmoe-")}


def finds_memory(folder: str | None, capacity: int) -> bool:
    """Whether this rank shares memory where files in memory are in `folder`; without one, the second rank is apart."""
    with join_ranks("cpu") as ranks:
        if folder is not None:
            one_machine.FOLDER = Path(folder)
        elif ranks.rank == 1:
            one_machine._opened = lambda name, total: None
        return SharedMemory.of(dist.group.WORLD, capacity) is not None


@pytest.mark.parametrize(("folder", "capacity"), [("nowhere", 4096), ("/dev/shm", 2**50), (None, 4096)])
def test_without_shared_memory_there_is_none(folder, capacity):
    assert on_ranks(2, finds_memory, folder, capacity) == [False, False]
