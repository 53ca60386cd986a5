"""What transformers' Trainer makes of our model in one process or in several, for tests/hf/test_step_balance.py.

A module of its own because processes import their function by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from configurations import VOCAB_SIZE
from olmoe import OlmoeForCausalLM
from olmoe.hf import BalancedSteps

ROWS = 8

# How a Trainer's processes share a model: its arguments, and those of from_pretrained.
WAYS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "ddp": ({}, {}),
    "accelerate's FSDP2": (
        {"fsdp": "full_shard", "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
        {},
    ),
    "fsdp": ({}, {"fsdp_size": 2}),
    "fsdp and expert": ({}, {"fsdp_size": 2, "ep_size": 2}),
}


class BalancedTrainer(BalancedSteps, transformers.Trainer):
    """transformers', whose steps balance experts over all their batches."""


def rows() -> datasets.Dataset:
    """Texts with prompts and padding of different lengths."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(ROWS):
        ids = torch.randint(2, VOCAB_SIZE - 1, (12,), generator=generator).tolist()
        kept = 12 - number % 3
        labels = [-100] * (number % 4) + ids[number % 4 : kept] + [-100] * (12 - kept)
        made.append({"input_ids": ids, "attention_mask": [1] * kept + [0] * (12 - kept), "labels": labels})
    return datasets.Dataset.from_list(made)


def step_of(
    folder: Path, output: Path, accumulation: int, balanced: bool, way: str = "ddp", ranks: int = 1
) -> dict[str, torch.Tensor]:
    """By how much one step of gradient descent at rate 1 over all rows changes each weight of the model in `folder`."""
    arguments, plan = WAYS[way]
    options = {"distributed_config": DistributedConfig(**plan)} if plan else {}
    model = OlmoeForCausalLM.from_pretrained(folder, **options)
    before = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    settings = transformers.TrainingArguments(
        output_dir=str(output), max_steps=1, per_device_train_batch_size=ROWS // accumulation // ranks,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    trainer = (BalancedTrainer if balanced else transformers.Trainer)(model, settings, train_dataset=rows())
    trainer.train()
    after = {name: whole(p.detach()) for name, p in trainer.model.named_parameters()}
    assert after.keys() == before.keys()
    return {name: after[name] - value for name, value in before.items()}


def steps_of(folder: Path, output: Path, ranks: int, cases: list[tuple[str, int, bool]]) -> list[Any]:
    """`step_of` for each way, accumulation and balancing, on this rank."""
    torch.set_num_threads(1)
    return [step_of(folder, output, accumulation, balanced, way, ranks) for way, accumulation, balanced in cases]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
