"""Messages between ranks of one machine, through memory that they share instead of through sockets.

gloo's sockets move 1 GB a second, a memory copy ten times as much. Only `sharding` needs it, on CPUs.

Shapes legend: P ranks, N rows of a rank or numbers of a message.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from olmoe.ops.cpu import extension
from olmoe.train.ranks import before_leaving

FOLDER = Path("/dev/shm")  # Linux's file system in memory
CAPACITY = 2**24  # bytes that a rank writes at a time
_COUNTERS = 4096  # bytes at the end, for the ranks' meetings
_LINE = 64  # bytes: where parts of a message begin


class _Mapped(NamedTuple):
    """The memory of an open file."""

    memory: Tensor
    file: BinaryIO


class SharedMemory:
    """Collectives for the ranks of a group, all of them on one machine.

    Each rank has a slot, which it writes and all read. A message takes one meeting of the ranks: there are two sets of
    slots, used in turn, and who writes to one again has met all others after they had read it.

    Ranks meet by counters in the same memory, or without compiled kernels by a collective of the group. Each holds a
    lock on its own byte of the file until it leaves, which the system takes from it even if it is killed.
    """

    def __init__(self, group: dist.ProcessGroup, mapped: _Mapped) -> None:
        import fcntl  # which only Unix has

        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.file, self.counters = mapped.file, mapped.memory[-_COUNTERS:]
        self.sets = mapped.memory[:-_COUNTERS].view(2, self.size, -1)
        self.turn = 0
        counts = extension.available() and self.size * extension.kernels().counter_bytes <= _COUNTERS
        self.arrived = None if counts else torch.zeros(1)
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, self.rank)
        before_leaving(self.file.close)

    @classmethod
    def of(cls, group: dist.ProcessGroup, capacity: int = CAPACITY) -> SharedMemory | None:
        """The memory that these ranks share, or None if there is none: they are on several machines, or it is full."""
        total = 2 * group.size() * capacity + _COUNTERS
        with contextlib.ExitStack() as stack:
            names: list[str | None] = [None]
            if group.rank() == 0:
                with contextlib.suppress(OSError):
                    names = [stack.enter_context(_reserved(total))]
            dist.broadcast_object_list(names, group=group, group_src=0)
            mapped = None if names[0] is None else _opened(names[0], total)
            all_have = torch.tensor(float(mapped is not None))
            dist.all_reduce(all_have, op=dist.ReduceOp.MIN, group=group)  # all have opened it, so its name may go
        if mapped is None or not bool(all_have):
            return None
        memory = cls(group, mapped)
        dist.all_reduce(all_have, group=group)  # until now no lock shows that a rank is there
        return memory

    def gather(self, output: Tensor, own: Tensor) -> None:
        """Let `output` be what all ranks have, one after the other."""
        out_PN = output.view(self.size, -1)
        if out_PN[self.rank].data_ptr() != own.data_ptr():
            out_PN[self.rank].copy_(own)
        for start in range(0, out_PN.shape[1], self._count(own)):
            part = slice(start, start + self._count(own))
            slots_PN = self._slots(own.dtype)[:, : len(own[part])]
            slots_PN[self.rank].copy_(own[part])
            self._meet()
            for other in self._others():
                out_PN[other, part].copy_(slots_PN[other])

    def reduce(self, output: Tensor, values: Tensor) -> None:
        """Let `output` be this rank's part of the sum over ranks, added in their order."""
        in_PN = values.view(self.size, -1)
        count = self._count(values) // self.size
        for start in range(0, in_PN.shape[1], count):
            parts_PN, out_N = in_PN[:, start : start + count], output[start : start + count]
            slots_PPN = self._slots(values.dtype)[:, : self.size * count].view(self.size, self.size, count)
            slots_PPN = slots_PPN[..., : len(out_N)]
            for other in self._others():
                slots_PPN[self.rank, other].copy_(parts_PN[other])
            self._meet()
            terms = [parts_PN[p] if p == self.rank else slots_PPN[p, self.rank] for p in range(self.size)]
            torch.add(terms[0], terms[1], out=out_N)
            for term in terms[2:]:
                out_N.add_(term)

    def sum(self, values: Tensor) -> None:
        """Add to `values` (N) in place those of the other ranks, in the order of ranks: the same bits on each."""
        count = self._count(values)
        for part in values.split(count):
            slots_PN = self._slots(values.dtype)[:, : len(part)]
            slots_PN[self.rank].copy_(part)
            self._meet()
            torch.add(slots_PN[0], slots_PN[1], out=part)
            for term in slots_PN[2:]:
                part.add_(term)

    def gather_rows(self, *tensors: Tensor) -> tuple[list[int], list[Tensor]]:
        """How many rows each rank has, and of each tensor (N, C) the rows of all, one rank's after the other's."""
        counts: list[int] = []
        gathered: list[Tensor] = []
        start = 0
        while not counts or start < max(counts):
            slots = self._slots(torch.uint8)
            heads, rooms = slots[:, :_LINE].view(torch.int64)[:, 0], slots[:, _LINE:]
            heads[self.rank] = len(tensors[0])
            most = _most_rows(rooms[self.rank], tensors)
            for place, rows in zip(_places(rooms[self.rank], tensors, most), tensors, strict=True):
                part = rows[start : start + most]
                place[: len(part)] = part
            self._meet()
            if not counts:
                counts = heads.tolist()
                gathered = [rows.new_empty(sum(counts), rows.shape[1]) for rows in tensors]
            for p, count in enumerate(counts):
                sent, first = max(0, min(most, count - start)), sum(counts[:p]) + start
                for out, place in zip(gathered, _places(rooms[p], tensors, most), strict=True):
                    out[first : first + sent] = place[:sent]
            start += most
        return counts, gathered

    def sum_rows(self, counts: list[int], *tensors: Tensor) -> list[Tensor]:
        """The reverse of `gather_rows`: this rank's rows of each tensor, summed over the ranks in their order."""
        parts = [rows.split(counts) for rows in tensors]
        summed = [torch.empty_like(part[self.rank]) for part in parts]
        start = 0
        while start < max(counts):
            slots = self._slots(torch.uint8)
            rooms = slots[:, : slots.shape[1] // (self.size * _LINE) * self.size * _LINE].unflatten(1, (self.size, -1))
            most = _most_rows(rooms[0, 0], tensors)
            here = slice(start, start + most)
            for p in self._others():
                for place, part in zip(_places(rooms[self.rank, p], tensors, most), parts, strict=True):
                    place[: len(part[p][here])] = part[p][here]
            self._meet()
            places = [_places(rooms[p, self.rank], tensors, most) for p in range(self.size)]
            for i, (out, part) in enumerate(zip(summed, parts, strict=True)):
                own = part[self.rank][here]
                terms = [own if p == self.rank else places[p][i][: len(own)] for p in range(self.size)]
                total = torch.add(terms[0].float(), terms[1])
                for term in terms[2:]:
                    total += term
                out[here] = total
            start += most
        return summed

    def _count(self, values: Tensor) -> int:
        """Numbers that fit in a slot."""
        return self.sets.shape[-1] // values.element_size()

    def _slots(self, dtype: torch.dtype) -> Tensor:
        """The slots (P, N) whose turn it is."""
        self.turn += 1
        return self.sets[self.turn % 2].view(dtype)

    def _others(self) -> Iterator[int]:
        return (p for p in range(self.size) if p != self.rank)

    def _meet(self) -> None:
        """Wait until all ranks are here. Raises `DistNetworkError` if one has left or does not arrive."""
        if self.arrived is not None:
            dist.all_reduce(self.arrived, group=self.group)
            return
        kernels, where = extension.kernels(), (self.counters.data_ptr(), self.file.fileno())
        missing = kernels.meet(*where, self.size, self.rank, self.turn, default_pg_timeout.total_seconds())
        if missing >= 0 and kernels.has_left(self.file.fileno(), missing):
            raise dist.DistNetworkError(f"rank {missing} has left the shared memory")
        if missing >= 0:
            raise dist.DistNetworkError(f"rank {missing} has not arrived within {default_pg_timeout}")


def _most_rows(room: Tensor, tensors: Sequence[Tensor]) -> int:
    """How many rows of each tensor `_places` can have."""
    most = (len(room) - _LINE * len(tensors)) // sum(rows.shape[1] * rows.element_size() for rows in tensors)
    assert most > 0
    return most


def _places(room: Tensor, tensors: Sequence[Tensor], most: int) -> list[Tensor]:
    """Places in memory for `most` rows of each tensor, one tensor's after the other's."""
    found, start = [], 0
    for rows in tensors:
        size = most * rows.shape[1] * rows.element_size()
        found.append(room[start : start + size].view(rows.dtype).view(most, rows.shape[1]))
        start += -(-size // _LINE) * _LINE
    return found


class _Allocates:
    """What else FSDP2 requires of its collectives."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a message before it is sent and after it has arrived."""
        return torch.empty(tuple(size), dtype=dtype, device=device)


class GatherInMemory(_Allocates):
    """FSDP2's all-gather."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """Done when it returns."""
        self.memory.gather(output_tensor, input_tensor)


class ReduceInMemory(_Allocates):
    """FSDP2's reduce-scatter, where sums are asked for."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Done when it returns."""
        assert op == dist.ReduceOp.SUM
        self.memory.reduce(output_tensor, input_tensor)


@contextlib.contextmanager
def _reserved(total: int) -> Iterator[str]:
    """A file in memory of so many bytes, all of which exist; it has its name until the block ends."""
    descriptor, name = tempfile.mkstemp(prefix="olmoe-", dir=FOLDER)
    try:
        os.posix_fallocate(descriptor, 0, total)  # else a full file system would end the process at the first write
        yield name
    finally:
        os.close(descriptor)
        os.unlink(name)


def _opened(name: str, total: int) -> _Mapped | None:
    """The memory of a file, or None where there is none: another machine."""
    try:
        file = open(name, "r+b")  # noqa: SIM115  (its lock lasts as long as it is open)
        return _Mapped(torch.frombuffer(mmap.mmap(file.fileno(), total), dtype=torch.uint8), file)
    except OSError:
        return None
