"""Messages through shared memory equal the process group's own collectives."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olmoe.ops.cpu import extension
from olmoe.train import one_machine
from olmoe.train.one_machine import SharedMemory
from olmoe.train.ranks import join_ranks
from rank_processes import ends_on_ranks, on_ranks

CAPACITY = 4096


def largest_differences(count: int) -> list[float]:
    """Largest differences from gloo on this rank, over several messages of `count` numbers in turn."""
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
def test_messages_equal_the_collectives_of_the_group(ranks, count):
    before = set(one_machine.FOLDER.iterdir())
    for differences in on_ranks(ranks, largest_differences, count):
        assert differences == pytest.approx([0.0] * 6, abs=1e-6)
    assert not {f for f in set(one_machine.FOLDER.iterdir()) - before if f.name.startswith("olmoe-")}


def rows_of_all(counts: list[int], meets_by: str) -> None:
    """Rank p has `counts[p]` rows of two tensors; three messages there and back, the last with other counts."""
    if meets_by == "gloo":
        extension.available = lambda: False
    with join_ranks("cpu") as ranks:
        memory = SharedMemory.of(dist.group.WORLD, CAPACITY)
        assert memory is not None
        assert (memory.arrived is None) == (meets_by == "counters")
        for number, message in enumerate((counts, counts, counts[::-1])):
            first, size = sum(message[: ranks.rank]), sum(message)
            own = slice(first, first + message[ranks.rank])
            ids, values = torch.arange(size * 3).view(size, 3), torch.randn(size, 5, generator=seeded(number))
            found, (ids_of_all, values_of_all) = memory.gather_rows(ids[own], values[own])
            assert found == message
            assert torch.equal(ids_of_all, ids)
            assert torch.equal(values_of_all, values)
            terms = [torch.randn(size, 5, generator=seeded(p)) for p in range(ranks.size)]
            summed, low = memory.sum_rows(message, terms[ranks.rank], terms[ranks.rank].bfloat16())
            assert torch.equal(summed, sum(terms)[own])
            assert torch.equal(low, sum(term.bfloat16().float() for term in terms)[own].bfloat16())


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("meets_by", ["counters", "gloo"])
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([7, 7], id="equal"),
        pytest.param([3, 0], id="one has none"),
        pytest.param([0, 0], id="nobody has any"),
        pytest.param([1, 300, 40], id="several slots, but not of all"),
    ],
)
def test_rows_are_gathered_and_summed(counts, meets_by):
    if meets_by == "counters" and not extension.available():
        pytest.skip("without kernels ranks meet by gloo")
    on_ranks(len(counts), rows_of_all, counts, meets_by)


def wait_for_one_who_leaves(how: str, folder: Path) -> None:
    """Rank 1 of three leaves after a message; the others wait for another and write a file when they get the error."""
    with join_ranks("cpu") as ranks:
        memory = SharedMemory.of(dist.group.WORLD, CAPACITY)
        assert memory is not None
        memory.gather_rows(torch.ones(ranks.rank, 2))
        if ranks.rank != 1:
            with pytest.raises(dist.DistNetworkError, match="rank 1 has left"):
                memory.gather_rows(torch.ones(ranks.rank, 2))
            (folder / f"told-{ranks.rank}").touch()
        elif how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == 1:  # the process stays alive, as in a notebook
        deadline = time.monotonic() + 60
        while len(told(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)


def told(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("told-*"))


@pytest.mark.skipif(not extension.available(), reason="without kernels ranks meet by gloo")
@pytest.mark.parametrize("how", ["is killed", "lives on"])
def test_waiting_for_a_rank_that_has_left_is_an_error(how, tmp_path):
    with contextlib.suppress(FileNotFoundError):  # a killed process does not report how it ended
        ends_on_ranks(tmp_path, 3, wait_for_one_who_leaves, how, tmp_path)
    assert told(tmp_path) == ["told-0", "told-2"]


def finds_memory(folder: str | None, capacity: int) -> bool:
    """Whether this rank shares memory where files in memory are in `folder`; without one, the second rank is apart."""
    with join_ranks("cpu") as ranks:
        if folder is not None:
            one_machine.FOLDER = Path(folder)
        elif ranks.rank == 1:
            one_machine._opened = lambda name, total: None
        return SharedMemory.of(dist.group.WORLD, capacity) is not None


@pytest.mark.parametrize(("folder", "capacity"), [("nowhere", 4096), ("/dev/shm", 2**50), (None, 4096)])
def test_ranks_without_shared_memory_do_not_use_it(folder, capacity):
    assert on_ranks(2, finds_memory, folder, capacity) == [False, False]
