"""Which tokens of which sequences run through the network in the next step. No torch.

There are no separate prefill and decoding phases: every sequence catches up with its tokens, a prompt in chunks, a text
by the token chosen last. What a sequence computed can be thrown away ("preempted") and computed again, since results do
not depend on how they were computed.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple

from olmoe.engine.block_pool import BlockPool, next_hash
from olmoe.engine.request import Request


class Sequence:
    """A request as the scheduler sees it: its tokens, how many of them have keys and values, and in which blocks.

    `root` starts its chain of hashes: sequences with different roots share nothing. `fresh` is the number of its first
    tokens that must run through the network once, whatever is in the prefix cache.
    """

    __slots__ = ("blocks", "computed", "fresh", "hashes", "ids", "key", "prompt_length", "request", "root")

    def __init__(self, request: Request, root: bytes = b"", fresh: int = 0) -> None:
        self.request, self.root, self.fresh = request, root, fresh
        self.ids = [*request.prompt_ids, *request.token_ids]
        self.prompt_length = len(request.prompt_ids)
        self.computed = 0
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        self.key = (request.priority, 0)  # sequences are served in this order

    @property
    def left(self) -> int:
        """Tokens that have to run through the network before the next one can be chosen."""
        return len(self.ids) - self.computed

    def hashes_up_to(self, blocks: int, size: int) -> list[bytes]:
        """The hashes of its first blocks, all of them full."""
        for b in range(len(self.hashes), blocks):
            self.hashes.append(next_hash(self.hashes[-1] if b else self.root, self.ids[b * size : (b + 1) * size]))
        return self.hashes[:blocks]


class Chunk(NamedTuple):
    """The next `tokens` of a sequence, after the `start` that were computed before."""

    sequence: Sequence
    start: int
    tokens: int

    @property
    def complete(self) -> bool:
        """Whether the sequence's next token can be chosen after it."""
        return self.start + self.tokens == len(self.sequence.ids)


class Scheduler:
    """Waiting and running sequences over one pool.

    A step has at most `token_budget` tokens and `max_rows` sequences. Decoding sequences come first, then prompts by
    priority and arrival, whether already started or still waiting. A sequence is admitted when the pool has room for
    all of its tokens. With `stepwise`, generated tokens are computed one at a time even when they are computed again.
    """

    def __init__(
        self, pool: BlockPool, *, max_rows: int, token_budget: int, prefix_cache: bool = True, stepwise: bool = False
    ) -> None:
        self.pool, self.max_rows, self.token_budget = pool, max_rows, token_budget
        self.waiting: list[Sequence] = []  # by key
        self.running: list[Sequence] = []  # by key
        self.preemptions = self.queried_tokens = self.cached_tokens = 0
        self._prefix_cache, self._stepwise = prefix_cache, stepwise
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        assert self.blocks_of(sequence.request.most_tokens) <= self.pool.blocks
        self._arrivals += 1
        sequence.key = (sequence.request.priority, self._arrivals)
        _insert(self.waiting, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has finished or was given up; its blocks are freed."""
        if sequence.blocks:
            self.running.remove(sequence)
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def blocks_of(self, tokens: int) -> int:
        """The number of blocks that this many tokens take."""
        return -(-tokens // self.pool.size)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; call `advance` with them once they are computed."""
        chosen: dict[Sequence, Chunk] = {}
        room, preempted = self.token_budget, False
        for sequence in self._by_turn():
            if room <= 0:
                break
            if not sequence.blocks:  # preempted by an earlier one
                continue
            if sequence.left > 1 and not preempted:  # later but more urgent sequences do not wait for it
                room = self._admit(chosen, room, before=sequence.key)
                if room <= 0:
                    break
            chunk = self._chunk(sequence, room)
            chosen[sequence] = chunk
            room -= chunk.tokens
            for victim in self._grow(sequence, chunk.start + chunk.tokens):
                preempted = True
                if victim in chosen:
                    room += chosen.pop(victim).tokens
        if not preempted:
            self._admit(chosen, room)
        return list(chosen.values())

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Note that these chunks have been computed: blocks that they filled can be shared."""
        size = self.pool.size
        for sequence, start, count in chunks:
            sequence.computed = start + count
            full = sequence.computed // size
            if self._prefix_cache and full > start // size:
                names = sequence.hashes_up_to(full, size)
                for b in range(start // size, full):
                    self.pool.publish(sequence.blocks[b], names[b])

    def check(self) -> None:
        """Assert that the sequences that list a block hold it, and that nobody writes into what others read."""
        self.pool.check()
        holders: dict[int, int] = {}
        for sequence in self.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            assert sequence.computed <= len(sequence.blocks) * self.pool.size
            for block in sequence.blocks:
                holders[block] = holders.get(block, 0) + 1
        for sequence in self.running:
            for block in sequence.blocks[sequence.computed // self.pool.size :]:
                assert holders[block] == 1, block
        assert len(holders) == self.pool.used
        assert all(not sequence.blocks and not sequence.computed for sequence in self.waiting)
        assert len(self.running) <= self.max_rows
        assert not set(self.running) & set(self.waiting)

    # ---- sequences that run ----

    def _by_turn(self) -> list[Sequence]:
        """Running sequences: those with one token first, since a reader waits for the next."""
        prompts = [sequence for sequence in self.running if sequence.left > 1]
        if not prompts:
            return list(self.running)
        return [sequence for sequence in self.running if sequence.left == 1] + prompts

    def _chunk(self, sequence: Sequence, room: int) -> Chunk:
        count = min(sequence.left, room)
        if self._stepwise:
            prompt_left = sequence.prompt_length - sequence.computed
            count = min(count, prompt_left) if prompt_left > 0 else 1
        return Chunk(sequence, sequence.computed, count)

    def _grow(self, sequence: Sequence, tokens: int) -> list[Sequence]:
        """Get blocks for this many tokens -> the sequences preempted for it, as a last resort itself."""
        missing = self.blocks_of(tokens) - len(sequence.blocks)
        victims: list[Sequence] = []
        while missing > 0:
            blocks = self.pool.allocate(missing)
            if blocks is not None:
                sequence.blocks += blocks
                break
            victim = self.running.pop()  # the least urgent and latest
            self._preempt(victim)
            victims.append(victim)
            if victim is sequence:
                break
        return victims

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        _insert(self.waiting, sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0

    # ---- sequences that wait ----

    def _admit(self, chosen: dict[Sequence, Chunk], room: int, before: tuple[int, int] | None = None) -> int:
        """Admit waiting sequences, and add their first chunks, of at most `room` tokens in total -> the room left.

        With `before`, only those whose turn comes before that key's.
        """
        if not self.waiting or room <= 0 or (before is not None and self.waiting[0].key > before):
            return room
        promised = self._promised(self.running) if self._prefix_cache else set()
        at = 0
        while at < len(self.waiting) and room > 0 and len(self.running) < self.max_rows:
            sequence = self.waiting[at]
            if before is not None and sequence.key > before:
                break
            names = self._sharable(sequence)
            matched = self.pool.match(names)
            if len(matched) < len(names) and names[len(matched)] in promised:
                at += 1  # what it needs is being computed for another sequence: it can soon share that
                continue
            missing = self.blocks_of(len(sequence.ids)) - len(matched)
            # Sequences that still grow will need another block before long, which must not come from the newcomer.
            reserve = sum(self.blocks_of(each.request.most_tokens) > len(each.blocks) for each in self.running)
            if missing + reserve > self.pool.available(matched):
                break
            self.pool.take(matched)
            blocks = self.pool.allocate(missing)
            assert blocks is not None  # a sequence alone always fits: `add` has checked
            del self.waiting[at]
            self._start(sequence, matched, blocks)
            promised |= self._promised([sequence]) if self._prefix_cache else set()
            chosen[sequence] = chunk = self._chunk(sequence, room)
            room -= chunk.tokens
        return room

    def _start(self, sequence: Sequence, matched: list[int], blocks: list[int]) -> None:
        _insert(self.running, sequence)
        sequence.blocks = matched + blocks
        sequence.computed = len(matched) * self.pool.size
        if not sequence.request.token_ids and not sequence.request.cached_tokens:  # not preempted before
            self.queried_tokens += len(sequence.ids)
            self.cached_tokens += sequence.computed
            sequence.request.cached_tokens = sequence.computed

    def _sharable(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the blocks that it may find computed: the full ones, except that of its last token."""
        if not self._prefix_cache or sequence.fresh:
            return []
        return sequence.hashes_up_to((len(sequence.ids) - 1) // self.pool.size, self.pool.size)

    def _promised(self, sequences: Iterable[Sequence]) -> set[bytes]:
        """Hashes of blocks that sequences are about to fill."""
        size, promised = self.pool.size, set[bytes]()
        for sequence in sequences:
            if sequence.left > 1:
                names = sequence.hashes_up_to(len(sequence.ids) // size, size)
                promised.update(names[sequence.computed // size :])
        return promised


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(sequences, sequence, key=lambda each: each.key)
