"""The processes that train one model together: who they are, what they agree on, and how an error on one ends all.

A single process is one rank without a group; then everything here does what it would without this module. Nothing
here knows about models or data.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from olmoe.errors import ConfigError, UserError
from olmoe.runtime import log

T = TypeVar("T")


class ToldByAnother(UserError):
    """This rank ends because of something that another rank tells the user, in one sentence for all."""


class RankLostError(UserError):
    """Another rank has ended without an explanation, so the ranks cannot continue together."""


class _LossToldByAnother(ToldByAnother, RankLostError):
    """Another rank has ended, and a third one tells the user."""


class _Outcome(NamedTuple):
    """What some work returned, or the user error that it raised."""

    value: Any
    error: UserError | OSError | None


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. `local_rank` counts the ones of this machine.

    They talk over torch's default group, or over `group`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None  # torch's, over which processes find each other
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what one process writes: folders, metrics, words to the user."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """This rank's own device of the kind that was chosen: of several GPUs, one a rank."""
        if chosen == torch.device("cuda") and self.size > 1:
            chosen = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(chosen)
        return chosen

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place; the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is true on any rank."""
        return [value > 0 for value in self.sum(torch.tensor(flags, dtype=torch.float32)).tolist()]

    def share(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's items, and whether each counts: all ranks get equally many, because they compute together."""
        for first in range(0, len(items), self.size):
            own = first + self.rank
            yield (items[own], True) if own < len(items) else (items[first], False)

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, on all. A mistake that it meets there ends all."""
        if self.size == 1:
            return work()
        outcomes = [_outcome(work) if self.is_first else None]
        dist.broadcast_object_list(outcomes, src=0, group=self.group)
        (outcome,) = outcomes
        assert outcome is not None
        if outcome.error is not None:
            self._raise(outcome.error, 0)
        value: T = outcome.value
        return value

    def on_all(self, work: Callable[[], T]) -> T:
        """What `work`, which may not talk to other ranks, returns on this rank. A mistake that any meets ends all."""
        if self.size == 1:
            return work()
        outcome = _outcome(work)
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, outcome.error, group=self.group)
        for rank, error in enumerate(errors):
            if error is not None:
                self._raise(error, rank)
        value: T = outcome.value
        return value

    def first_in_turn(self, work: Callable[[], T]) -> T:
        """`on_all`, where the first rank has finished before the others begin: they find the files that it made."""
        if self.size == 1:
            return work()
        done: list[T] = []
        outcome, turn = _Outcome(None, None), f"olmoe/turn/{next(_turns)}"
        if self.is_first:
            outcome = _outcome(lambda: done.append(work()))
            if self.store is not None:
                self.store.set(turn, "over")
        elif self.store is not None:  # tokenizing may take hours, longer than a collective waits
            self.store.wait([turn], timedelta(days=30))
        self.on_first(lambda: _raise_error(outcome))
        return self.on_all(lambda: done[0] if done else work())

    def _raise(self, error: UserError | OSError, rank: int) -> None:
        raise error if rank == self.rank else ToldByAnother(str(error))

    @contextlib.contextmanager
    def guarded(self, way_on: Callable[[], str]) -> Iterator[None]:
        """Let one rank tell the user what ends all: a mistake that all find, or the lost connection to another.

        `way_on` says how to continue the run afterwards.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except ToldByAnother:
            raise
        except BaseException as error:
            _let_sigterm_pass()
            lost = isinstance(error, RuntimeError) and _is_lost_connection(error)
            # Whatever ends this rank is reported here, so that others need not report its end.
            is_first_to_end = self._is_first_to_tell(_ENDED)
            if lost:
                reason = _reason(error)
                if not is_first_to_end:
                    raise _LossToldByAnother(reason) from None
                raise RankLostError(
                    f"Another of the {self.size} processes has ended ({reason}), so the run stops here; {way_on()}."
                ) from None
            if isinstance(error, UserError) and not self._is_first_to_tell(str(error)):
                raise ToldByAnother(str(error)) from None
            raise

    def _is_first_to_tell(self, message: str) -> bool:
        try:
            return self.store is None or self.store.add(f"olmoe/told/{message}", 1) == 1
        except RuntimeError:  # the store is gone as well
            return True


ALONE = Ranks()
_ENDED = "a process has ended"
_TELL_SECONDS = 60.0  # between two sentences about what is waited for
_turns = itertools.count()
_before_leaving: list[Callable[[], None]] = []


@contextlib.contextmanager
def join_ranks(device: str, *, group_of_one: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started together with this process, or that the caller has already joined in torch.

    A process that was started by itself is `ALONE`; with `group_of_one`, it has a group for what needs one. Only the
    first rank logs what is not an error.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not started and not group_of_one:
        yield ALONE
        return
    ranks = _init(device, started)
    level = log.level
    if not ranks.is_first:
        log.setLevel(logging.ERROR)
    try:
        yield ranks
    except RankLostError:
        raise  # waiting for the others to leave would never end
    except BaseException:
        _leave()
        raise
    else:
        _leave()
    finally:
        log.setLevel(level)


def _init(device: str, started: bool) -> Ranks:
    """Join the group. Raises `ConfigError` if the environment does not describe one that can be joined."""
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    backend = "cpu:gloo,cuda:nccl" if on_cuda and dist.is_nccl_available() else "gloo"
    if not started:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return Ranks()
    try:
        store, rank, size = next(rendezvous("env://"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        store = _among_the_living(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"The other processes could not be joined ({_reason(error)}); start all of them with torchrun, "
            "which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        ) from None
    return Ranks(rank, size, local_rank, store)


def _among_the_living(store: Any, rank: int, size: int) -> Store:
    """`store` without what others have left there.

    torchrun's store outlives the processes that it starts again, which would find the addresses of the dead in it and
    what those had told. Its count of restarts need not be the same on all machines. So the first rank gives this
    attempt a name of its own, and answers each other rank's word, which nobody has used before, until that has read it.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"olmoe/word/{rank}", word)
        with _telling_waits(lambda: f"rank {rank} of {size} waits for rank 0"):
            own = PrefixStore(store.get(f"olmoe/answer/{word}").decode(), store)
        own.set(f"joined/{rank}", "")
        return own
    own = PrefixStore(word, store)
    missing, answered = list(range(1, size)), set[bytes]()
    deadline = time.monotonic() + store.timeout.total_seconds()
    with _telling_waits(lambda: f"waiting for {_listed(missing)} of {size} processes"):
        while missing:
            for other in missing:
                if store.check([f"olmoe/word/{other}"]) and (said := store.get(f"olmoe/word/{other}")) not in answered:
                    store.set(f"olmoe/answer/{said.decode()}", word)  # to one that may have ended long ago
                    answered.add(said)
            missing = [other for other in missing if not own.check([f"joined/{other}"])]
            if missing and time.monotonic() > deadline:
                raise RuntimeError(f"rank {missing[0]} of {size} has not come")
            time.sleep(0.01 if missing else 0)
    return own


@contextlib.contextmanager
def _telling_waits(reason: Callable[[], str]) -> Iterator[None]:
    """Tell every minute what the block is waiting for, one process on each machine, until it has ended."""
    over = threading.Event()

    def tell() -> None:
        minutes = 0
        while not over.wait(_TELL_SECONDS):
            minutes += 1
            log.warning("%s (%d min so far); see that torchrun started it", reason(), minutes)

    teller = threading.Thread(target=tell, daemon=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        teller.start()
    try:
        yield
    finally:
        over.set()


def _listed(ranks: Sequence[int]) -> str:
    """Ranks in words, only the first few of many."""
    shown = ", ".join(map(str, ranks[:4]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def before_leaving(work: Callable[[], None]) -> None:
    """Let `work` be done when this process leaves the group that `join_ranks` joined, whatever makes it leave."""
    _before_leaving.append(work)


def _leave() -> None:
    while _before_leaving:
        _before_leaving.pop()()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


def _let_sigterm_pass() -> None:
    """Do nothing at the next SIGTERM, which torchrun sends to all once one has ended: this rank may be about to tell.

    One after that ends the process, as does the next one already if the caller handles signals.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _raise_error(outcome: _Outcome) -> None:
    if outcome.error is not None:
        raise outcome.error


def _outcome(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work(), None)
    except (UserError, OSError) as error:
        return _Outcome(None, error)


def _reason(error: BaseException) -> str:
    """What torch says, without the place in its source and its advice."""
    line = str(error).strip().split("\n")[0]
    return re.sub(r"^\[[^\]]*\] ", "", line).split(". This is typically")[0].rstrip(". ")[-200:]


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether torch says so: gloo by words of its own, NCCL and the store by their types."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "connection" in text
