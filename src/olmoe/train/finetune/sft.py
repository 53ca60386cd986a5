"""Supervised fine-tuning: the cross-entropy of what the assistant writes.

    loss = sum over trained tokens of -log p / trained tokens of the whole step + auxiliary losses

Every trained token of a step has the same weight, whichever microbatch or sample it is in: the summed loss of OLMoE's
recipe, divided by a number that the optimizer does not see. Means over microbatches would give tokens of short answers
more weight.

Shapes legend: N tokens of a batch, D hidden, E experts.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olmoe.errors import ConfigError
from olmoe.model import CausalLM
from olmoe.model.router_losses import load_balancing, router_z, tokens_per_expert
from olmoe.runtime import log
from olmoe.train.data import name_files, sha256
from olmoe.train.document_mask import isolated_attend
from olmoe.train.finetune.chats import Sample, read_samples
from olmoe.train.finetune.config import ChatSource, SFTConfig
from olmoe.train.finetune.loop import finetune
from olmoe.train.finetune.losses import cross_entropy, head_weight
from olmoe.train.finetune.masks import Example, make_examples
from olmoe.train.finetune.packing import Batch, pack
from olmoe.train.finetune.plan import Plan
from olmoe.train.finetune.start import Start


def sft(config: SFTConfig, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True) -> Path:
    """Fine-tune on chats, or continue to; see `finetune`."""
    return finetune(
        config,
        lambda start, device: ChatTask(config, start, device),
        resume=resume,
        overwrite=overwrite,
        show_progress=show_progress,
    )


class ChatTask:
    """The examples of all files, and what steps compute from them. See `loop.Task`."""

    def __init__(self, config: SFTConfig, start: Start, device: torch.device) -> None:
        self.config, self.device = config, device
        self._names = name_files(config.resolve(s.path) for s in (*config.data.train, *config.data.valid))
        self.prompts: list[Sample] = []
        train = [self._read(source, start) for source in config.data.train]
        self.held_out = {self._name(s): self._read(s, start, held_out=True) for s in config.data.valid}
        self.examples = [example for examples in train for example in examples]
        lengths = [[len(example.inputs) for example in examples] for examples in train]
        self.plan = Plan(
            list(zip(lengths, (source.repeat for source in config.data.train), strict=True)),
            capacity=config.data.sequence_length if config.data.packing else None,
            epochs=config.schedule.epochs,
            batch=config.batch,
            seed=config.run.seed,
        )
        predictions, trained = sum(map(sum, lengths)), sum(example.trained for example in self.examples)
        log.info(
            "%d samples: %d tokens, %d of them trained; %d steps", len(self.examples), predictions, trained, self.steps
        )

    @property
    def steps(self) -> int:
        """See `loop.Task`."""
        return self.plan.steps

    @property
    def has_held_out(self) -> bool:
        """See `loop.Task`."""
        return bool(self.held_out)

    def fingerprint(self) -> dict[str, Any]:
        """See `loop.Task`."""
        sources = (*self.config.data.train, *self.config.data.valid)
        return {"texts": {self._name(source): sha256(self.config.resolve(source.path)) for source in sources}}

    def prepare(self, model: CausalLM, output: Path, resumed: bool, show_progress: bool) -> None:
        """See `loop.Task`."""

    def accumulate(self, model: CausalLM, step: int) -> dict[str, float]:
        """See `loop.Task`."""
        config, batches = self.config.loss, self.plan.microbatches(step)
        examples = [[self.examples[number] for number in numbers] for numbers in batches]
        trained = sum(example.trained for batch in examples for example in batch)
        values = dict.fromkeys(("loss", "load_balancing", "router_z", "tokens"), 0.0)
        counts_LE = torch.zeros(0)
        for batch in (Batch.of(each, self.device) for each in examples):
            output = model(batch.ids, batch.positions, isolated_attend(batch.lengths))
            loss = cross_entropy(output.hidden, head_weight(model), batch.labels) / trained
            balance, z = load_balancing(output.routers), router_z(output.routers)
            auxiliary = config.load_balancing * balance + config.router_z * z if _wanted(self.config) else 0.0
            (loss + auxiliary / len(batches)).backward()
            values["loss"] += float(loss.detach())
            values["load_balancing"] += float(balance.detach()) / len(batches)
            values["router_z"] += float(z.detach()) / len(batches)
            values["tokens"] += len(batch.ids)
            counts = torch.stack([tokens_per_expert(router) for router in output.routers]).float()
            counts_LE = counts if counts_LE.numel() == 0 else counts_LE + counts
        load = float((counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).mean())
        return values | {"trained_tokens": trained, "max_load_over_mean": load}

    @torch.no_grad()
    def evaluate(self, model: CausalLM, samples: int) -> tuple[dict[str, Any], float]:
        """See `loop.Task`: nats a trained token of each file."""
        losses: dict[str, float] = {}
        for name, examples in self.held_out.items():
            chosen = examples if samples == 0 else _spread(examples, samples)
            losses[name] = _held_out_loss(model, chosen, self.config.data.sequence_length, self.device)
        score = statistics.fmean(losses.values()) if losses else float("inf")
        return ({"held_out_loss": {name: round(loss, 5) for name, loss in losses.items()}} if losses else {}), score

    def _name(self, source: ChatSource) -> str:
        return self._names[self.config.resolve(source.path)]

    def _read(self, source: ChatSource, start: Start, *, held_out: bool = False) -> list[Example]:
        path, data = self.config.resolve(source.path), self.config.data
        samples = list(read_samples(path, chat=source.chat))
        if held_out:
            self.prompts += samples
        examples, count = make_examples(
            samples,
            start.tokenizer,
            length=data.sequence_length,
            turns=data.turns,
            too_long=data.too_long,
            file=str(path),
        )
        if count.cut or count.dropped:
            log.warning(
                "%s: of %d samples %d were cut to data.sequence_length %d and %d left out",
                path, count.samples, count.cut, data.sequence_length, count.dropped,
            )  # fmt: skip
        largest = max(int(example.inputs.max()) for example in examples)
        if largest >= start.model_config.vocab_size:
            raise ConfigError(f"{path} becomes the id {largest}, beyond the model's vocabulary.")
        return examples


def _wanted(config: SFTConfig) -> bool:
    """Whether the auxiliary losses are trained: they cost a backward pass through the routers' softmax."""
    return config.loss.load_balancing > 0 or config.loss.router_z > 0


def _spread(examples: list[Example], count: int) -> list[Example]:
    """So many examples at even distances."""
    return [examples[i] for i in np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)]


def _held_out_loss(model: CausalLM, examples: list[Example], length: int, device: torch.device) -> float:
    """Nats a trained token."""
    nats, trained, weight = 0.0, 0, head_weight(model)
    for numbers in pack([len(example.inputs) for example in examples], max(length, 2048)):
        batch = Batch.of([examples[number] for number in numbers], device)
        output = model(batch.ids, batch.positions, isolated_attend(batch.lengths))
        nats += float(cross_entropy(output.hidden, weight, batch.labels))
        trained += sum(examples[number].trained for number in numbers)
    return nats / trained
