"""Supervised fine-tuning: the cross-entropy of what the assistant writes.

    loss = sum over trained tokens of -log p / trained tokens of the whole step + auxiliary losses

Every trained token of a step has the same weight, whichever microbatch or sample it is in. Means over microbatches
would give tokens of short answers more weight. With `loss.reduce = "sum"` tokens of different steps have the same
weight too, as with the summed loss of OLMoE's recipe: the divisor is then the mean number of trained tokens of the
run's steps. It is constant, so AdamW does not notice it, but the norm that gradients are clipped by stays that of a
mean.

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
from olmoe.runtime import log, no_grad
from olmoe.train.dropout import residual_dropout
from olmoe.train.finetune.chats import read_samples
from olmoe.train.finetune.config import ChatSource, SFTConfig
from olmoe.train.finetune.loop import finetune
from olmoe.train.finetune.losses import cross_entropy, head_weight
from olmoe.train.finetune.masks import Example, make_examples
from olmoe.train.finetune.packing import Batch, pack
from olmoe.train.finetune.start import Start
from olmoe.train.finetune.task import Task
from olmoe.train.ranks import ALONE, Ranks


def sft(config: SFTConfig, *, resume: bool = False, overwrite: bool = False, show_progress: bool = True) -> Path:
    """Fine-tune on chats, or continue to; see `finetune`."""
    return finetune(config, "sft", ChatTask, resume=resume, overwrite=overwrite, show_progress=show_progress)


class ChatTask(Task[SFTConfig]):
    """The examples of all files, and the summed loss of their trained tokens."""

    held_out: dict[str, list[Example]]

    def __init__(self, config: SFTConfig, start: Start, device: torch.device, ranks: Ranks = ALONE) -> None:
        super().__init__(config, start, device, ranks)
        train = [self._read(source) for source in config.data.train]
        self.held_out = {self.name_of(s): self._read(s, held_out=True) for s in config.data.valid}
        self.examples = [example for examples in train for example in examples]
        lengths = [[len(example.inputs) for example in examples] for examples in train]
        self.plan = self._plan(lengths, config.data.sequence_length if config.data.packing else None)
        every_row = sum(self.examples[number].trained for row in self.plan.rows for number in row)
        self._divisor = every_row / self.plan.steps if config.loss.reduce == "sum" else None
        predictions, trained = sum(map(sum, lengths)), sum(example.trained for example in self.examples)
        log.info(
            "%d samples: %d tokens, %d of them trained; %d steps", len(self.examples), predictions, trained, self.steps
        )

    def accumulate(self, model: CausalLM, step: int) -> dict[str, float]:
        """See `Task`."""
        config, ranks, numbers_in_step = self.config.loss, self.ranks, self.plan.examples(step)
        trained = sum(self.examples[number].trained for number in numbers_in_step)
        divisor = self._divisor or trained
        parts = self.plan.parts(step, ranks.size)
        dropout, first = self.config.residual_dropout, step * self.config.batch.accumulation * ranks.size + ranks.rank
        values = dict.fromkeys(("loss", "load_balancing", "router_z", "tokens"), 0.0)
        counts_LE = torch.zeros(())
        for place, numbers in enumerate(self.plan.microbatches(step, ranks.rank, ranks.size)):
            # A rank without examples computes along with the others and adds nothing.
            weight = 1.0 if numbers else 0.0
            batch = Batch.of([self.examples[n] for n in numbers or numbers_in_step[:1]], self.device)
            with residual_dropout(model, dropout, self.config.run.seed + first + place * ranks.size):
                output = model(batch.ids, batch.positions, batch.attention_for(model))
                loss = cross_entropy(output.hidden, head_weight(model), batch.labels) / divisor
                load_LE = torch.stack([tokens_per_expert(router) for router in output.routers]).float()
                counts_LE = counts_LE + load_LE * weight
                if self.config.parallel.balance == "all":
                    load_LE = ranks.sum(load_LE * weight)
                balance, z = load_balancing(output.routers, counts_LE=load_LE), router_z(output.routers)
                auxiliary = config.load_balancing * balance + config.router_z * z if _wanted(self.config) else 0.0
                # Around backward too, so that recomputation drops the same values.
                ((loss + auxiliary / parts) * weight).backward()
            values["loss"] += weight * float(loss.detach()) * (divisor / trained)
            values["load_balancing"] += weight * float(balance.detach()) / parts
            values["router_z"] += weight * float(z.detach()) / parts
            values["tokens"] += weight * len(batch.ids)
        counts_LE = ranks.sum(counts_LE)
        load = float((counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).mean())
        return self._sum(values) | {"trained_tokens": trained, "max_load_over_mean": load}

    @no_grad
    def evaluate(self, model: CausalLM, samples: int) -> tuple[dict[str, Any], float]:
        """See `Task`: nats a trained token of each file."""
        losses: dict[str, float] = {}
        for name, examples in self.held_out.items():
            chosen = examples if samples == 0 else _spread(examples, samples)
            losses[name] = _held_out_loss(model, chosen, self.config.data.sequence_length, self.device, self.ranks)
        score = statistics.fmean(losses.values()) if losses else float("inf")
        return ({"held_out_loss": {name: round(loss, 5) for name, loss in losses.items()}} if losses else {}), score

    def _read(self, source: ChatSource, *, held_out: bool = False) -> list[Example]:
        path, data = self.config.resolve(source.path), self.config.data
        samples = list(read_samples(path, chat=source.chat))
        if held_out:
            self.prompts += samples
        examples, count = make_examples(
            samples,
            self.start.tokenizer,
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
        if largest >= self.start.model_config.vocab_size:
            raise ConfigError(f"{path} becomes the id {largest}, beyond the model's vocabulary.")
        return examples


def _wanted(config: SFTConfig) -> bool:
    """Whether the auxiliary losses are trained: they cost a backward pass through the routers' softmax."""
    return config.loss.load_balancing > 0 or config.loss.router_z > 0


def _spread(examples: list[Example], count: int) -> list[Example]:
    """So many examples at even distances."""
    return [examples[i] for i in np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)]


def _held_out_loss(model: CausalLM, examples: list[Example], length: int, device: torch.device, ranks: Ranks) -> float:
    """Nats a trained token."""
    nats = 0.0
    for numbers, counts in ranks.share(pack([len(example.inputs) for example in examples], max(length, 2048))):
        batch = Batch.of([examples[number] for number in numbers], device)
        output = model(batch.ids, batch.positions, batch.attention_for(model))
        if counts:
            nats += float(cross_entropy(output.hidden, head_weight(model), batch.labels))
    (nats,) = ranks.sum(torch.tensor([nats], dtype=torch.float64)).tolist()
    return nats / sum(example.trained for example in examples)
