"""Which examples each step of a run sees, decided before it starts: everything follows from the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from olmoe.errors import ConfigError
from olmoe.train.config import BatchConfig
from olmoe.train.finetune.packing import pack


class Plan:
    """Rows of examples, epoch after epoch, cut into steps and these into microbatches.

    An epoch takes each source `repeat` times. Its rows are packed anew, so that an example has other neighbours, and
    shuffled. The last step may have fewer rows than others.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[int], float]],
        *,
        capacity: int | None,
        epochs: float,
        batch: BatchConfig,
        seed: int,
    ) -> None:
        """`sources` are the lengths of examples and how often each is taken; without `capacity` each has its row."""
        self._batch = batch
        self.rows: list[list[int]] = []
        epoch = 0
        while epoch < epochs:
            rows = _epoch(sources, capacity, seed, epoch)
            self.rows += rows[: round(len(rows) * min(1.0, epochs - epoch))]
            epoch += 1
        if not self.rows:
            raise ConfigError(f"schedule.epochs {epochs} of these samples do not fill one row; raise it.")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-len(self.rows) // self._rows_in_step)

    @property
    def _rows_in_step(self) -> int:
        return self._batch.sequences * self._batch.accumulation

    def microbatches(self, step: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
        """The numbers of the examples of each microbatch of a step, counted from 0; of each, one of `ranks`' share.

        All ranks have equally many shares. Some may be empty in the last step.
        """
        parts = self._parts(step, ranks)
        parts += [[]] * (-len(parts) % ranks)
        return parts[rank::ranks]

    def parts(self, step: int, ranks: int = 1) -> int:
        """How many shares of microbatches have examples in them, of all ranks together."""
        return len(self._parts(step, ranks))

    def examples(self, step: int) -> list[int]:
        """The numbers of all examples of a step."""
        return [number for part in self._parts(step, 1) for number in part]

    def _parts(self, step: int, ranks: int) -> list[list[int]]:
        rows = self.rows[step * self._rows_in_step : (step + 1) * self._rows_in_step]
        size = self._batch.sequences // ranks
        return [[n for row in rows[i : i + size] for n in row] for i in range(0, len(rows), size)]


def _epoch(
    sources: Sequence[tuple[Sequence[int], float]], capacity: int | None, seed: int, epoch: int
) -> list[list[int]]:
    generator = np.random.default_rng((seed, epoch))
    chosen: list[int] = []
    lengths: list[int] = []
    for these, repeat in sources:
        first, count = len(lengths), len(these)
        lengths += these
        numbers = np.arange(first, first + count)
        whole, part = divmod(repeat, 1)
        chosen += numbers.tolist() * int(whole)
        chosen += generator.permutation(numbers)[: round(part * count)].tolist()
    order = [chosen[i] for i in generator.permutation(len(chosen))]
    if capacity is None:
        return [[number] for number in order]
    packed = pack([lengths[number] for number in order], capacity)
    rows = [[order[i] for i in row] for row in packed]
    return [rows[i] for i in generator.permutation(len(rows))]
