"""Random sequences of scheduler operations: nothing is lost, wrongly shared or starved."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from olmoe.engine.block_pool import BlockPool
from olmoe.engine.request import Request
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.scheduler import Scheduler, Sequence

SIZE = 4


class Serving(RuleBasedStateMachine):
    """Small pools, short blocks, few different tokens: preemption and shared prefixes all the time."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler
        self.open: set[Sequence] = set()
        self.contents: dict[int, dict[int, tuple]] = {}  # the tokens from which a block's positions were computed

    @initialize(blocks=st.integers(4, 12), rows=st.integers(1, 4), budget=st.integers(1, 20), cache=st.booleans())
    def begin(self, blocks, rows, budget, cache) -> None:
        self.rows, self.budget = min(rows, budget), budget
        self.scheduler = Scheduler(BlockPool(blocks, SIZE), max_rows=self.rows, token_budget=budget, prefix_cache=cache)

    @rule(
        target=sequences,
        base=st.sampled_from([0, 0, 1]),
        count=st.integers(1, 13),
        tail=st.lists(st.integers(0, 1), max_size=2),
        limit=st.integers(0, 12),
        priority=st.sampled_from([0, 0, 0, 1]),
        root=st.sampled_from([b"", b"", b"other"]),
        fresh=st.booleans(),
    )
    def add(self, base, count, tail, limit, priority, root, fresh):
        prompt = [base] * count + tail
        request = Request(prompt, SamplingParams(), limit, priority=priority)
        if self.scheduler.blocks_of(request.most_tokens) > self.scheduler.pool.blocks:
            return multiple()
        sequence = Sequence(request, root, len(prompt) if fresh else 0)
        self.scheduler.add(sequence)
        self.open.add(sequence)
        return sequence

    @rule(sequence=consumes(sequences))
    def abort(self, sequence) -> None:
        if sequence in self.open:
            self.finish(sequence)

    @rule(token=st.integers(0, 1))
    def step(self, token) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        chunks = scheduler.schedule()
        assert sum(chunk.tokens for chunk in chunks) <= self.budget
        assert len({chunk.sequence for chunk in chunks}) == len(chunks) <= self.rows
        if self.open:
            assert chunks, "work, but no progress"
        assert {chunk.sequence for chunk in chunks} <= set(scheduler.running)
        for sequence, start, tokens in chunks:
            assert start == sequence.computed
            assert 0 < tokens <= sequence.left
            assert len(sequence.blocks) * SIZE >= start + tokens
            self.compute(sequence, start, tokens)
        scheduler.advance(chunks)
        self.keeps_order(waiting)
        for chunk in chunks:
            if chunk.complete:
                request = chunk.sequence.request
                if len(request.token_ids) >= request.limit:
                    self.finish(chunk.sequence)
                    continue
                request.token_ids.append(token)
                chunk.sequence.ids.append(token)

    def compute(self, sequence: Sequence, start: int, tokens: int) -> None:
        """A fake network in which a position's keys depend on all earlier tokens, read from the cache."""
        blocks = sequence.blocks
        for position in range(start):
            expected = (sequence.root, *sequence.ids[: position + 1])
            assert self.contents[blocks[position // SIZE]][position % SIZE] == expected
        for position in range(start, start + tokens):
            block = self.contents.setdefault(blocks[position // SIZE], {})
            block[position % SIZE] = (sequence.root, *sequence.ids[: position + 1])

    def keeps_order(self, waiting: list[Sequence]) -> None:
        """Nothing of equal priority is ahead of an admitted sequence, except those waiting for a prefix in progress."""
        admitted = [each for each in waiting if each in self.scheduler.running]
        passed = [each for each in waiting if each not in self.scheduler.running]
        for one in admitted:
            for other in passed:
                if other.key < one.key:
                    assert any(
                        running is not other and running.root == other.root and running.ids[:SIZE] == other.ids[:SIZE]
                        for running in self.scheduler.running
                    )

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.open.discard(sequence)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check()
        assert set(self.scheduler.running) | set(self.scheduler.waiting) == self.open

    def teardown(self) -> None:
        for _ in range(10_000):
            if not self.open:
                break
            self.step(0)
        assert not self.open, "requests that never end"
        assert self.scheduler.pool.used == 0


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_an_urgent_prompt_overtakes_a_long_one_in_progress():
    scheduler = Scheduler(BlockPool(64, SIZE), max_rows=8, token_budget=10)

    def add(count: int, priority: int) -> Sequence:
        sequence = Sequence(Request([count] * count, SamplingParams(), 5, priority=priority))
        scheduler.add(sequence)
        return sequence

    def step() -> list[tuple[Sequence, int]]:
        chunks = scheduler.schedule()
        scheduler.advance(chunks)
        return [(chunk.sequence, chunk.tokens) for chunk in chunks]

    long = add(100, 0)
    assert step() == [(long, 10)]
    later = add(7, 0)
    assert step() == [(long, 10)]  # first come, first served within a priority
    urgent, unhurried = add(8, -1), add(6, 1)
    assert step() == [(urgent, 8), (long, 2)]
    urgent.ids.append(1)
    assert step() == [(urgent, 1), (long, 9)]
    scheduler.remove(urgent)
    while long.left > 9:
        assert step() == [(long, min(10, long.left + 10))]
    assert [sequence for sequence, _ in step()] == [long, later]
    assert unhurried in scheduler.waiting
