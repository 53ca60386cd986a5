"""What is learned, and from what data: the part of fine-tuning that chats and preferences do not share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from olmoe.model import CausalLM
from olmoe.train.data import name_files, sha256
from olmoe.train.finetune.chats import Sample
from olmoe.train.finetune.config import ChatSource, FinetuneConfig
from olmoe.train.finetune.plan import Plan
from olmoe.train.finetune.start import Start
from olmoe.train.ranks import ALONE, Ranks

Config = TypeVar("Config", bound=FinetuneConfig)


class Task(ABC, Generic[Config]):
    """The examples of a configuration's files, and what steps compute of them. Ranks share every computation.

    `prompts` are held-out samples whose prompts are answered for the log. A subclass reads files and makes the `plan`.
    """

    plan: Plan
    held_out: Mapping[str, Sequence[Any]]  # by the names of files

    def __init__(self, config: Config, start: Start, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.config, self.start, self.device, self.ranks = config, start, device, ranks
        self._names = name_files(config.resolve(source.path) for source in self._sources)
        self.prompts: list[Sample] = []

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan.steps

    @property
    def has_held_out(self) -> bool:
        """Whether there is data to choose the best checkpoint by."""
        return bool(self.held_out)

    def fingerprint(self) -> dict[str, Any]:
        """The contents of the data, which must not change during a run."""
        return {"texts": {self.name_of(s): sha256(self.config.resolve(s.path)) for s in self._sources}}

    def name_of(self, source: ChatSource) -> str:
        """What metrics call a file."""
        return self._names[self.config.resolve(source.path)]

    def prepare(self, model: CausalLM, output: Path, resumed: bool, show_progress: bool) -> None:
        """Compute what the task needs from the model before training, or read it from `output` if `resumed`."""

    @abstractmethod
    def accumulate(self, model: CausalLM, step: int) -> dict[str, float]:
        """Add this rank's gradients of a step, counted from 0, and return what all measured; `tokens` among it."""

    @abstractmethod
    def evaluate(self, model: CausalLM, samples: int) -> tuple[dict[str, Any], float]:
        """Measures by their names, and the score that is best when lowest, on that many samples per file (0: all)."""

    @property
    def _sources(self) -> tuple[ChatSource, ...]:
        return (*self.config.data.train, *self.config.data.valid)

    def _plan(self, lengths: Sequence[Sequence[int]], capacity: int | None) -> Plan:
        """The plan of examples of these lengths, by training file."""
        return Plan(
            list(zip(lengths, (source.repeat for source in self.config.data.train), strict=True)),
            capacity=capacity,
            epochs=self.config.schedule.epochs,
            batch=self.config.batch,
            seed=self.config.run.seed,
        )

    def _sum(self, values: dict[str, float]) -> dict[str, float]:
        """What all ranks measured together."""
        if self.ranks.size == 1:
            return values
        summed = self.ranks.sum(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
        return dict(zip(values, summed, strict=True))
