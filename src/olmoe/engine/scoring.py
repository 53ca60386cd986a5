"""How probable given texts are: many at once, with shared parts computed once, and only the logits that are needed.

Evaluation harnesses score thousands of continuations, many of them of the same context. Texts are sorted into trees of
tokens: a prefix that several share is one run of tokens, which runs through the network once, whether it fills whole
blocks of the cache or not. A text's score does not depend on what else is scored; with the kernels' runner this is
exact to the bit.

Shapes legend: R rows with logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from olmoe.engine.block_pool import BlockPool
from olmoe.errors import UserError
from olmoe.ops.cache import KEY_BLOCK
from olmoe.runner import Batch, CacheView, Runner, Want, position_bytes
from olmoe.runner.policy import ResolvedPolicy
from olmoe.runtime import inference_mode

CACHE_BYTES = 2**31
# The most runs of tokens in one step.
MOST_RUNS = 256
# Rows whose exponentials are summed together: few enough to stay in the processor's cache.
_ROWS = 16


class Scored(NamedTuple):
    """The natural logarithm of a text's probability given its context, and whether greedy decoding would produce it."""

    logprob: float
    greedy: bool


class _Text:
    """A text to be scored: its tokens from `first` on."""

    __slots__ = ("first", "greedy", "ids", "left", "logprob")

    def __init__(self, ids: Sequence[int], first: int) -> None:
        assert 1 <= first < len(ids), (first, len(ids))
        self.ids, self.first = list(ids), first
        self.left = len(ids) - first  # tokens whose probability is not known yet
        self.logprob, self.greedy = 0.0, True

    @property
    def inputs(self) -> list[int]:
        """The tokens to run through the network: all but the last, which nothing follows."""
        return self.ids[:-1]


@dataclass(eq=False)
class _Run:
    """Tokens `start` to `end`, shared by all `texts`, which agree up to there; they follow those of `parent`."""

    ids: list[int]  # of one of them
    start: int
    end: int
    parent: _Run | None
    texts: list[int]
    children: list[_Run] = field(default_factory=list)
    scored_from: int = 0  # the first position whose logits are needed
    need: int = 0  # blocks that it and the longest path through its children take
    computed: int = 0
    waiting: int = 0  # children that have not started, for which its blocks are kept
    blocks: list[int] = field(default_factory=list)

    def own_blocks(self, size: int) -> int:
        """Blocks that it takes for itself: those filled by its ancestors' tokens are shared."""
        return -(-self.end // size) - self.start // size


class _Chunk(NamedTuple):
    run: _Run
    start: int
    end: int

    @property
    def scored(self) -> range:
        """Positions that need logits."""
        return range(max(self.start, self.run.scored_from), self.end)


class Scorer:
    """Scores texts with a runner, in a cache of at most `cache_bytes`, or what the longest text takes if that is more.

    `max_rows` is the most runs of tokens in one step, `token_budget` the most tokens (None: what the runner is fastest
    with). `policy` changes what routers choose. `given_tokens` and `computed_tokens` count what has been scored so far:
    they differ by what texts had in common.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        cache_bytes: int = CACHE_BYTES,
        cache_dtype: torch.dtype | None = None,
        max_rows: int = MOST_RUNS,
        token_budget: int | None = None,
        policy: ResolvedPolicy | None = None,
    ) -> None:
        self._runner, self._policy = runner, policy
        self._cache_bytes, self._cache_dtype = cache_bytes, cache_dtype
        self._max_rows, self._token_budget = max_rows, token_budget or runner.chunk_tokens
        # Keys that depend on the length of a text cannot be shared.
        self._share = runner.config.rope.rope_type != "dynamic"
        self.given_tokens = self.computed_tokens = 0

    def score(self, texts: Sequence[tuple[Sequence[int], int]]) -> Iterator[tuple[int, Scored]]:
        """The score of each (ids, first), with its index, as it is finished: of its tokens from index `first` on.

        `first` is at least 1, since something must precede what is scored. Raises `UserError` for logits that are not
        finite.
        """
        found = [_Text(ids, first) for ids, first in texts]
        if found:
            yield from _Scoring(self, found).run()

    def _pass(self, chunks: Sequence[_Chunk], view: CacheView) -> Tensor:
        """Logits (R, V) of the positions that need them."""
        ids: list[int] = []
        wanted: list[int] = []
        for run, start, end in chunks:
            wanted += range(len(ids) + max(start, run.scored_from) - start, len(ids) + end - start)
            ids += run.ids[start:end]
        batch = Batch(
            ids,
            [end - start for _, start, end in chunks],
            [start for _, start, _ in chunks],
            [run.end for run, _, _ in chunks],
            None if self._policy is None else [self._policy] * len(chunks),
        )
        self.computed_tokens += len(ids)
        return self._runner.forward(batch, view, Want(wanted)).logits

    def _pool(self, roots: Sequence[_Run], size: int) -> int:
        """Blocks to hold: as many as could be useful, within the memory allowed."""
        token_bytes = position_bytes(self._runner.config, self._cache_dtype or self._runner.cache_dtype)
        allowed = self._cache_bytes // (token_bytes * size)
        return max(min(allowed, sum(run.need * (1 + len(run.texts)) for run in roots)), max(run.need for run in roots))


class _Scoring:
    """One call of `Scorer.score`."""

    def __init__(self, scorer: Scorer, texts: list[_Text]) -> None:
        self._scorer, self._texts = scorer, texts
        scorer.given_tokens += sum(len(text.ids) - 1 for text in texts)
        roots = _trees(texts, share=scorer._share)
        _plan(roots, texts, KEY_BLOCK)
        blocks = scorer._pool(roots, KEY_BLOCK)
        self._cache = scorer._runner.new_cache(blocks, KEY_BLOCK, scorer._cache_dtype, KEY_BLOCK)
        self._pool = BlockPool(blocks, KEY_BLOCK)
        self._roots = roots[::-1]  # the next is the last
        self._ready: list[_Run] = []  # whose parents are computed; the next is the last
        self._running: list[_Run] = []

    def run(self) -> Iterator[tuple[int, Scored]]:
        """Step by step, until all are scored."""
        while self._roots or self._ready or self._running:
            chunks = self._schedule()
            assert chunks  # what has started can always be finished
            for number in self._step(chunks):
                text = self._texts[number]
                if not math.isfinite(text.logprob) and not text.logprob < 0:
                    raise UserError(
                        "The model's logits are not finite: its weights are broken, or overflow in float16; "
                        "try dtype float32."
                    )
                yield number, Scored(text.logprob, text.greedy)

    # ---- which tokens are next ----

    def _schedule(self) -> list[_Chunk]:
        """First the runs already started, then those that share what is in the cache, then new trees."""
        room = self._scorer._token_budget
        for queue in (self._ready, self._roots):
            at = len(queue)
            while at > 0 and sum(run.end - run.computed for run in self._running) < room:
                at -= 1
                if len(self._running) >= self._scorer._max_rows:
                    break
                if self._begin(queue[at]):
                    self._running.append(queue.pop(at))
                elif queue is self._roots:
                    break
        chunks = []
        for run in self._running:
            if room <= 0:
                break
            end = min(run.end, run.computed + room)
            chunks.append(_Chunk(run, run.computed, end))
            room -= end - run.computed
        return chunks

    def _begin(self, run: _Run) -> bool:
        """Allocate blocks for a run, if there is room for it and for its children one after another.

        Without that room several runs could start and then all wait for one another.
        """
        pool, parent = self._pool, run.parent
        if run.need > pool.free:
            return False
        shared = [] if parent is None else parent.blocks[: run.start // pool.size]
        pool.take(shared)
        new = pool.allocate(run.own_blocks(pool.size))
        assert new is not None
        run.blocks, run.computed = shared + new, run.start
        run.waiting = len(run.children)
        if parent is not None:
            if run.start % pool.size:  # nobody writes into a block that others read
                self._cache.copy(parent.blocks[len(shared)], new[0], run.start % pool.size)
            parent.waiting -= 1
            if not parent.waiting:
                pool.release(parent.blocks)
        return True

    # ---- a step ----

    @inference_mode
    def _step(self, chunks: Sequence[_Chunk]) -> list[int]:
        """Run chunks through the network -> the texts whose scores are then complete."""
        table = np.zeros((len(chunks), max(len(chunk.run.blocks) for chunk in chunks)), dtype=np.int32)
        for row, chunk in zip(table, chunks, strict=True):
            row[: len(chunk.run.blocks)] = chunk.run.blocks
        logits = self._scorer._pass(chunks, CacheView(self._cache, table))
        scored = self._note(chunks, logits)
        for run, _, end in chunks:
            run.computed = end
            if end == run.end:
                self._ready += run.children[::-1]
                if not run.children:
                    self._pool.release(run.blocks)
        self._running = [run for run in self._running if run.computed < run.end]
        return scored

    def _note(self, chunks: Sequence[_Chunk], logits: Tensor) -> list[int]:
        """Add what the logits (R, V) say to the score of each text -> the texts that are complete."""
        numbers, rows, targets = [], [], []
        at = 0
        for chunk in chunks:
            positions = chunk.scored
            for number in chunk.run.texts:
                text = self._texts[number]
                for position in range(max(positions.start, text.first - 1), positions.stop):
                    numbers.append(number)
                    rows.append(at + position - positions.start)
                    targets.append(text.ids[position + 1])
            at += len(positions)
        if not numbers:
            return []
        parts = logits.split(_ROWS)
        totals = torch.cat([part.logsumexp(dim=-1) for part in parts])
        best = torch.cat([part.argmax(dim=-1) for part in parts]).tolist()
        index = torch.tensor(rows, device=logits.device)
        chosen = logits[index, torch.tensor(targets, device=logits.device)] - totals[index]
        done = []
        for number, row, target, logprob in zip(numbers, rows, targets, chosen.tolist(), strict=True):
            text = self._texts[number]
            text.logprob += logprob
            text.greedy = text.greedy and best[row] == target
            text.left -= 1
            if not text.left:
                done.append(number)
        return done


# ---- from texts to trees ----


def _trees(texts: Sequence[_Text], *, share: bool) -> list[_Run]:
    """Runs of tokens in trees: each path from a root to a run's end is a prefix of all its texts."""
    roots: list[_Run] = []
    path: list[_Run] = []  # of the previous text, which in this order has the most in common with the next
    before: list[int] = []
    for number in sorted(range(len(texts)), key=lambda number: texts[number].ids[:-1]):
        inputs = texts[number].inputs
        common = _common(before, inputs) if share else 0
        while path and path[-1].start >= common:
            path.pop()
        if path and path[-1].end > common:
            path[-1] = _split(path[-1], common, roots)
        if common < len(inputs):
            parent = path[-1] if path else None
            leaf = _Run(inputs, common, len(inputs), parent, [])
            (roots if parent is None else parent.children).append(leaf)
            path.append(leaf)
        for run in path:
            run.texts.append(number)
        before = inputs
    return roots


def _split(run: _Run, at: int, roots: list[_Run]) -> _Run:
    """Split a run, the last of its parent's children, at a position -> its first part, the parent of the second."""
    first = _Run(run.ids, run.start, at, run.parent, list(run.texts), [run])
    (roots if run.parent is None else run.parent.children)[-1] = first
    run.start, run.parent = at, first
    return first


def _common(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix of two lists."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _plan(roots: Sequence[_Run], texts: Sequence[_Text], size: int) -> None:
    """Work out what each run needs."""
    order: list[_Run] = []
    left = list(roots)
    while left:
        run = left.pop()
        order.append(run)
        left += run.children
    for run in reversed(order):  # children first
        run.scored_from = min(texts[number].first for number in run.texts) - 1
        run.need = run.own_blocks(size) + max((child.need for child in run.children), default=0)
