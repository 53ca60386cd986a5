"""Learning from preferences: DPO (summed or length-normalised) and KTO against the model that the run started with.

The reference's log-probabilities are computed once, before the first step, and kept in the run's folder: no second
model is in memory while training. With adapters the reference is the model without them, which is the same.

Shapes legend: P pairs, S samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from olmoe.errors import CheckpointError, ConfigError, UserError
from olmoe.io.atomic import atomic_file
from olmoe.model import CausalLM
from olmoe.runtime import log, no_grad
from olmoe.train.finetune.chats import Completion, Conversation, Message, Sample
from olmoe.train.finetune.config import ChatSource, PreferenceConfig
from olmoe.train.finetune.loop import finetune
from olmoe.train.finetune.losses import cross_entropy, head_weight
from olmoe.train.finetune.masks import Example, fit, make_example
from olmoe.train.finetune.packing import Batch
from olmoe.train.finetune.preference_losses import dpo_loss, dpo_margins, kto_loss
from olmoe.train.finetune.preferences import read_judged, read_pairs
from olmoe.train.finetune.start import Start
from olmoe.train.finetune.task import Task
from olmoe.train.ranks import ALONE, Ranks

REFERENCE_NAME = "reference.npy"


def dpo(config: PreferenceConfig, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True) -> Path:
    """Learn from preferences, or continue to; see `finetune`."""
    return finetune(config, "dpo", PreferenceTask, resume=resume, overwrite=overwrite, show_progress=show_progress)


class PreferenceTask(Task[PreferenceConfig]):
    """The examples of all files, and the loss of the answers in them.

    A unit is what a step counts: a pair is two examples in a row, for KTO one and the same prompt with the answer to
    another, by which z is measured.
    """

    held_out: dict[str, list[int]]

    def __init__(self, config: PreferenceConfig, start: Start, device: torch.device, ranks: Ranks = ALONE) -> None:
        super().__init__(config, start, device, ranks)
        self._kto, self._norm = config.loss.kind == "kto", config.loss.kind == "dpo_norm"
        self.examples: list[Example] = []
        self._desirable: list[bool] = []  # of each unit, for KTO
        sizes = [len(self._read(source)) for source in config.data.train]
        self.held_out = {self.name_of(source): self._read(source, held_out=True) for source in config.data.valid}
        self.plan = self._plan([[1] * size for size in sizes], capacity=None)
        self.reference = np.zeros(0, np.float32)  # of each example, from `prepare`
        log.info("%d %s; %d steps", sum(sizes), "answers" if self._kto else "pairs", self.steps)

    def prepare(self, model: CausalLM, output: Path, resumed: bool, show_progress: bool) -> None:
        """The log-probabilities of all examples under the model that the run starts with, or started with."""
        path, ranks = output / REFERENCE_NAME, self.ranks
        if resumed:
            saved = ranks.on_all(lambda: self._read_reference(path))
            if saved is not None:
                self.reference = saved
                return
        self.reference = np.zeros(len(self.examples), np.float32)
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i].inputs))
        model.eval()
        with torch.no_grad(), tqdm(total=len(order), desc="reference", unit="answer", disable=not show_progress) as bar:
            for number, counts in ranks.share(order):
                found = float(self._log_probs(model, [number])[0])
                if counts:
                    self.reference[number] = found
                bar.update(min(ranks.size, len(order) - bar.n))
        ranks.sum(torch.from_numpy(self.reference))  # in its memory
        model.train()

        def write() -> None:
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, self.reference.reshape(self._reference_shape))

        ranks.on_first(write)

    @property
    def _reference_shape(self) -> tuple[int, ...]:
        """Of the file: by example, for KTO by unit."""
        return (len(self.examples) // 2, 2) if self._kto else (len(self.examples),)

    def _read_reference(self, path: Path) -> npt.NDArray[np.float32] | None:
        """What an earlier start of the run wrote; None if it must be computed again."""
        if not path.is_file():
            return None
        try:
            found = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({str(error).rstrip('.')}); remove it to compute it again."
            ) from None
        if self._kto and found.shape == (len(self.examples),):
            return None  # of an older version, which measured z with another answer to the same prompt
        if found.shape != self._reference_shape or found.dtype != np.float32:
            raise CheckpointError(
                f"{path} is of other samples than these {len(self.examples)}; remove it to compute it again."
            )
        return found.reshape(-1)

    def accumulate(self, model: CausalLM, step: int) -> dict[str, float]:
        """See `Task`."""
        ranks, units_in_step = self.ranks, self.plan.examples(step)
        count = len(units_in_step)
        baseline = self._baseline(model, units_in_step) if self._kto else None
        values: dict[str, float] = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        for units in self.plan.microbatches(step, ranks.rank, ranks.size):
            # A rank without examples computes along with the others and adds nothing.
            weight = 1.0 if units else 0.0
            losses, margins = self._losses(model, units or units_in_step[:1], baseline)
            (losses.sum() / count * weight).backward()
            values["loss"] += weight * float(losses.detach().sum()) / count
            values["accuracy"] += weight * float((margins > 0).sum()) / count
            values["margin"] += weight * float(margins.sum()) / count
        tokens = sum(len(self.examples[n].inputs) for unit in units_in_step for n in self._of(unit))
        return self._sum(values) | {"tokens": float(tokens)}

    @no_grad
    def evaluate(self, model: CausalLM, samples: int) -> tuple[dict[str, Any], float]:
        """See `Task`: the loss, and the share of pairs (or answers) on the right side of the reference."""
        losses, accuracies = {}, {}
        for name, units in self.held_out.items():
            chosen = units if samples == 0 else [
                units[i] for i in np.linspace(0, len(units) - 1, min(samples, len(units))).astype(int)
            ]  # fmt: skip
            baseline = self._baseline(model, chosen) if self._kto else None
            found = torch.zeros(len(chosen), 2, dtype=torch.float64)
            for place, counts in self.ranks.share(range(len(chosen))):
                loss, margin = self._losses(model, [chosen[place]], baseline)
                if counts:
                    found[place] = torch.tensor([float(loss), float(margin > 0)])
            each, right = self.ranks.sum(found).T.tolist()
            losses[name], accuracies[name] = round(statistics.fmean(each), 5), round(statistics.fmean(right), 5)
        score = statistics.fmean(losses.values()) if losses else float("inf")
        return ({"held_out_loss": losses, "held_out_accuracy": accuracies} if losses else {}), score

    # ---- log-probabilities ----

    def _of(self, unit: int) -> tuple[int, int]:
        """The numbers of a unit's examples."""
        return 2 * unit, 2 * unit + 1

    def _log_probs(self, model: CausalLM, numbers: Sequence[int]) -> Tensor:
        """The log-probability of each example's trained tokens, summed, or for "dpo_norm" their mean: (S,)."""
        examples = [self.examples[number] for number in numbers]
        batch = Batch.of(examples, self.device)
        hidden = model(batch.ids, batch.positions, batch.attention_for(model)).hidden
        weight = head_weight(model)  # after the pass, which gathers it where ranks share it
        parts = zip(hidden.split(batch.lengths), batch.labels.split(batch.lengths), strict=True)
        sums = torch.stack([-cross_entropy(part, weight, labels) for part, labels in parts])
        if self._norm:
            sums = sums / torch.tensor([example.trained for example in examples], device=self.device)
        return sums

    def _reference_of(self, numbers: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.reference[list(numbers)]).to(self.device)

    def _losses(self, model: CausalLM, units: list[int], baseline: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of each unit, and how far it is on the right side of the reference, detached."""
        settings, beta = self.config.loss, self.config.loss.strength
        if baseline is not None:
            numbers = [2 * unit for unit in units]
            moved = self._log_probs(model, numbers) - self._reference_of(numbers)
            desirable = torch.tensor([self._desirable[unit] for unit in units], device=self.device)
            weights = settings.desirable_weight, settings.undesirable_weight
            losses = kto_loss(moved, desirable, baseline, beta, *weights)
            return losses, torch.where(desirable, 1.0, -1.0) * (moved - baseline).detach()
        numbers = [number for unit in units for number in self._of(unit)]
        found, reference = self._log_probs(model, numbers), self._reference_of(numbers)
        margins = dpo_margins(found[::2], found[1::2], reference[::2], reference[1::2])
        return dpo_loss(margins, beta), margins.detach()

    @no_grad
    def _baseline(self, model: CausalLM, units: list[int]) -> Tensor:
        """KTO's z."""
        moved = torch.zeros(len(units), device=self.device)
        for place, counts in self.ranks.share(range(len(units))):
            numbers = [2 * units[place] + 1]
            found = self._log_probs(model, numbers) - self._reference_of(numbers)
            if counts:
                moved[place] = found[0]
        return self.ranks.sum(moved).mean().clamp(min=0.0)

    # ---- reading ----

    def _read(self, source: ChatSource, *, held_out: bool = False) -> list[int]:
        """The units of a file, whose examples are kept."""
        path, first = self.config.resolve(source.path), len(self.examples) // 2
        rows: list[tuple[Sample, Sample]]
        if self._kto:
            judged = list(read_judged(path, chat=source.chat))
            samples = [each.sample for each in judged]
            rows = [
                (sample, with_answer_of(sample, samples[i])) for sample, i in zip(samples, others(samples), strict=True)
            ]
            desirable = [each.desirable for each in judged]
        else:
            rows = [(pair.chosen, pair.rejected) for pair in read_pairs(path, chat=source.chat)]
            desirable = [True] * len(rows)
        dropped = 0
        for number, (row, wanted) in enumerate(zip(rows, desirable, strict=True), 1):
            fitted = [self._example(sample, number, path) for sample in row]
            if None in fitted:
                dropped += 1
                continue
            self.examples += [example for example in fitted if example is not None]
            self._desirable.append(wanted)
            if held_out:
                self.prompts.append(row[0])
        units = list(range(first, len(self.examples) // 2))
        if not units:
            raise ConfigError(
                f"None of the {len(rows)} samples of {path} has its answers within data.sequence_length "
                f"{self.config.data.sequence_length}; raise that."
            )
        if dropped:
            log.warning("%s: of %d samples %d are too long and left out", path, len(rows), dropped)
        return units

    def _example(self, sample: Sample, number: int, path: Path) -> Example | None:
        data = self.config.data
        try:
            return fit(make_example(sample, self.start.tokenizer, data.turns), data.sequence_length, data.too_long)
        except UserError as error:
            raise ConfigError(f"Sample {number} of {path} cannot be learned from: {str(error).rstrip('.')}.") from None


def others(samples: Sequence[Sample]) -> list[int]:
    """For each sample, the number of one with another prompt, for KTO's z: from the prompt before it in the file.

    Neighbours with one prompt, such as the two answers of a pair, get one each. Where all have the same prompt, the
    sample before stands in for another.
    """
    firsts = [i for i in range(len(samples)) if i == 0 or prompt(samples[i]) != prompt(samples[i - 1])]
    if len(firsts) == 1:
        return [i - 1 for i in range(len(samples))]
    runs = [range(start, end) for start, end in pairwise([*firsts, len(samples)])]
    last = -2 if prompt(samples[0]) == prompt(samples[-1]) else -1  # before the first run comes the end of the file
    before = [runs[last], *runs[:-1]]
    return [other[min(i, len(other) - 1)] for run, other in zip(runs, before, strict=True) for i in range(len(run))]


def prompt(sample: Sample) -> str | list[Message]:
    """What comes before a sample's last answer."""
    return sample.prompt if isinstance(sample, Completion) else sample.messages[:-1]


def with_answer_of(sample: Sample, other: Sample) -> Sample:
    """A sample's prompt with another one's last answer, which does not belong to it."""
    answer = other.completion if isinstance(other, Completion) else other.messages[-1]
    if isinstance(sample, Completion):
        text = answer if isinstance(answer, str) else str(answer.get("content") or "")
        return Completion(sample.prompt, text)
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return Conversation([*sample.messages[:-1], message], sample.trained, sample.tools)
