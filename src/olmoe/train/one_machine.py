"""Messages between ranks of one machine, through memory that they share instead of through sockets.

gloo's sockets move 1 GB a second, a memory copy ten times as much. Only `sharding` needs it, on CPUs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FOLDER = Path("/dev/shm")  # Linux's file system in memory
CAPACITY = 2**24  # bytes that a rank writes at a time


class SharedMemory:
    """Collectives for the ranks of a group, all of them on one machine.

    Each rank has a slot, which it writes and all read. A message takes one meeting of the ranks: there are two sets of
    slots, used in turn, and who writes to one again has met all others after they had read it. Ranks meet by a
    collective of the group, so that a lost one is noticed as everywhere else.
    """

    def __init__(self, group: dist.ProcessGroup, memory: Tensor) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.sets = memory.view(2, self.size, -1)
        self.turn = 0
        self.arrived = torch.zeros(1)

    @classmethod
    def of(cls, group: dist.ProcessGroup, capacity: int = CAPACITY) -> SharedMemory | None:
        """The memory that these ranks share, or None if there is none: they are apart, or it is full."""
        total = 2 * group.size() * capacity
        memory = None
        with contextlib.ExitStack() as stack:
            names: list[str | None] = [None]
            if group.rank() == 0:
                with contextlib.suppress(OSError):
                    names = [stack.enter_context(_reserved(total))]
            dist.broadcast_object_list(names, group=group, group_src=0)
            if names[0] is not None:
                memory = _opened(names[0], total)
            all_have = torch.tensor(float(memory is not None))
            dist.all_reduce(all_have, op=dist.ReduceOp.MIN, group=group)  # nobody opens it any more: it may go
        return cls(group, memory) if memory is not None and bool(all_have) else None

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

    def _count(self, values: Tensor) -> int:
        """Numbers that fit in a slot."""
        return self.sets.shape[-1] // values.element_size()

    def _slots(self, dtype: torch.dtype) -> Tensor:
        """The slots (P, N) whose turn it is."""
        self.turn = 1 - self.turn
        return self.sets[self.turn].view(dtype)

    def _others(self) -> Iterator[int]:
        return (p for p in range(self.size) if p != self.rank)

    def _meet(self) -> None:
        """Wait until all ranks have come this far."""
        dist.all_reduce(self.arrived, group=self.group)


class _Allocates:
    """What FSDP2 asks of its collectives besides."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a message before it is sent and after it has come."""
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


def _opened(name: str, total: int) -> Tensor | None:
    """The memory of a file, or None where there is none: another machine."""
    try:
        with open(name, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), total), dtype=torch.uint8)
    except OSError:
        return None
