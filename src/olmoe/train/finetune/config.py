"""What decides a fine-tuning run, read from one TOML file: `SFTConfig` of chats, `PreferenceConfig` of preferences.

The defaults are OLMoE's own recipes (arXiv 2409.02060, table 3 and appendix B; the code that trained the released
models). Neither has auxiliary losses: the paper's models came out better without them (table 7).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError, shown
from olmoe.train.config import (
    PRODUCTS,
    RECOMPUTATION,
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    RegularizationConfig,
    RunConfig,
    check_dropout,
)
from olmoe.train.finetune.masks import TOO_LONG, TURNS
from olmoe.train.ranges import check_ranges
from olmoe.train.toml_file import build, read_toml, resolve_path

SCHEDULES = ("linear", "cosine", "constant")
TARGETS = ("attention", "experts", "router")
PRECISIONS = ("fp32", "bf16")
LOSSES = ("dpo", "dpo_norm", "kto")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, kw_only=True)
class ChatSource:
    """A JSONL or JSON file of samples (see `chats` and `preferences`), relative to the configuration file.

    `repeat` is how often an epoch passes over it; a fraction takes that share of its samples, drawn again each epoch.
    `chat` puts the chat template around prompts and answers that are texts.
    """

    path: str
    repeat: float = 1.0
    chat: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """What is read. `valid` is held out, evaluated during training, and decides which checkpoint is best.

    `sequence_length` is the most predictions of one sample, and of a packed row; what is `too_long` is "cut" at its
    end, "drop"ped or "refuse"d. Trained are the answers of all `turns` of a chat, or of the "last". `packing` puts
    several samples into a row, each by itself.
    """

    train: tuple[ChatSource, ...]
    valid: tuple[ChatSource, ...] = ()
    sequence_length: int = 4096
    turns: str = "all"
    too_long: str = "cut"
    packing: bool = True


@dataclass(frozen=True, kw_only=True)
class FinetuneSchedule:
    """Learning rate by steps: linear from 0 over the share `warmup` of all steps, then down to `final_fraction`."""

    epochs: float = 2.0
    kind: str = "linear"
    warmup: float = 0.03
    final_fraction: float = 0.0

    def rate(self, peak: float, step: int, steps: int) -> float:
        """The rate of a step, counted from 0, of so many."""
        warm = round(self.warmup * steps)
        if step < warm:
            return peak * (step + 1) / warm
        if self.kind == "constant":
            return peak
        left, low = (steps - step) / (steps - warm), peak * self.final_fraction
        share = left if self.kind == "linear" else (1 - math.cos(math.pi * left)) / 2
        return low + (peak - low) * share


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizer(OptimizerConfig):
    """AdamW on all trained parameters, or "rmsprop" (the paper's KTO), which has no `betas`."""

    kind: str = "adamw"
    learning_rate: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FinetuneLoss(LossConfig):
    """How the cross-entropy of a step's trained tokens is reduced, and OLMoE's auxiliary losses, off by default.

    The "mean" of a step makes steps count the same, the "sum" tokens; see `sft`.
    """

    load_balancing: float = 0.0
    router_z: float = 0.0
    reduce: str = "mean"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) in place of training all weights: W + (alpha / rank) B A.

    `targets` are "attention", "experts", and "router", which is adapted only if it is named. `pack` packs the frozen
    weights in memory ("nf4", "int8", "q4_0" ...), for a checkpoint that is not packed itself (QLoRA). `precision` is
    that of products with the weights of attention and experts: "fp32", or "bf16", which rounds them and their inputs.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "experts")
    pack: str | None = None
    precision: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluation:
    """Held-out evaluation during training: how often, on how many samples of each file (0: all).

    `answers` is how many prompts of the held-out chats are answered for the log, in `answer_tokens` tokens at most.
    """

    every_steps: int = 100
    samples: int = 256
    answers: int = 2
    answer_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What all kinds of fine-tuning have in common. `base` is the folder that relative paths start from."""

    run: RunConfig
    data: ChatData
    batch: BatchConfig
    schedule: FinetuneSchedule = field(default_factory=FinetuneSchedule)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    adapter: AdapterConfig | None = None
    recompute: bool = False  # shorthand for compute.activation_checkpointing = "full"
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: FinetuneEvaluation = field(default_factory=FinetuneEvaluation)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    base: Path = field(default=Path(), metadata={"in_file": False})

    def resolve(self, path: str) -> Path:
        """A path of the configuration as seen from the current folder; see `resolve_path`."""
        return resolve_path(path, self.base)

    @property
    def start(self) -> str:
        """The checkpoint that the run starts from."""
        assert self.run.initialize_from is not None  # which `load` has checked
        return self.run.initialize_from

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation, but for the contents of files."""
        may_change = {"run", "evaluation", "checkpoint", "log", "parallel", "base", "recompute", "compute"}
        sections = {f.name for f in dataclasses.fields(self)} - may_change
        plain = {
            name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for name in sorted(sections)
            if (value := getattr(self, name)) is not None
        }
        if self.adapter is not None and self.adapter.precision == AdapterConfig.precision:
            del plain["adapter"]["precision"]  # unknown to older versions, whose runs must still resume
        if self.compute.precision != ComputeConfig.precision:  # likewise
            plain["precision"] = self.compute.precision
        if isinstance(self, SFTConfig) and self.loss.reduce == FinetuneLoss.reduce:
            del plain["loss"]["reduce"]  # likewise
        return plain | {"seed": self.run.seed, "balance": self.parallel.balance}

    @property
    def of_layers(self) -> ComputeConfig:
        """How a layer computes: `compute`, with `recompute`."""
        return dataclasses.replace(self.compute, activation_checkpointing="full") if self.recompute else self.compute


@dataclass(frozen=True, kw_only=True)
class SFTConfig(FinetuneConfig):
    """Supervised fine-tuning: the answers of chats are learned."""

    loss: FinetuneLoss = field(default_factory=FinetuneLoss)
    regularization: RegularizationConfig | None = None  # dropout, where few texts are passed over many times

    @property
    def residual_dropout(self) -> float:
        """The share that `regularization` leaves out; 0 without it."""
        return 0.0 if self.regularization is None else self.regularization.residual_dropout


@dataclass(frozen=True, kw_only=True)
class PreferenceSchedule(FinetuneSchedule):
    """As for chats, with the paper's warm-up and epochs for preferences."""

    epochs: float = 3.0
    warmup: float = 0.1


@dataclass(frozen=True, kw_only=True)
class PreferenceOptimizer(FinetuneOptimizer):
    """AdamW with the paper's rate for preferences."""

    learning_rate: float = 5e-7


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """`kind` "dpo" compares summed log-probabilities, "dpo_norm" their means over tokens, "kto" needs no pairs.

    `beta` is by default 0.1 (OLMoE 0924), and 5 for "dpo_norm" (0125). The weights are those of "kto"'s two halves.
    """

    kind: str = "dpo"
    beta: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def strength(self) -> float:
        """`beta`, the kind's own if it is not given."""
        return self.beta if self.beta is not None else (5.0 if self.kind == "dpo_norm" else 0.1)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(FinetuneConfig):
    """Learning from preferences: answers that are better than others."""

    schedule: PreferenceSchedule = field(default_factory=PreferenceSchedule)
    optimizer: PreferenceOptimizer = field(default_factory=PreferenceOptimizer)
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)


Kind = TypeVar("Kind", bound=FinetuneConfig)


def load_config(path: str | Path, kind: type[Kind]) -> Kind:
    """Read and check a TOML file. Raises `ConfigError` with the offending key and value."""
    path = Path(path)
    raw = read_toml(path)
    for name in ("model", "tokenizer"):
        if name in raw:
            raise ConfigError(
                f"[{name}] is for olmoe train: the checkpoint of run.initialize_from brings its own; leave "
                f"[{name}] out."
            )
    config: Kind = dataclasses.replace(build(kind, raw, ""), base=path.parent)
    _check(config)
    return config


def _check_adapter(config: FinetuneConfig) -> None:
    if config.adapter is not None and config.parallel.expert > 1:
        raise ConfigError(
            f"parallel.expert {config.parallel.expert} is for training all weights, but there is an [adapter]; leave "
            "parallel.expert out: the ranks of parallel.data share adapters and the weights beside them."
        )


def _check_compute(config: FinetuneConfig) -> None:
    compute = config.compute
    if compute.compile:
        raise ConfigError(
            "compute.compile is for olmoe train: here every batch has samples of other lengths, for which layers would "
            "be recompiled; leave it out."
        )
    if config.recompute and compute.activation_checkpointing == "selective":
        raise ConfigError(
            'recompute = true is short for compute.activation_checkpointing "full", but that is "selective"; leave out '
            "one."
        )
    if config.adapter is not None and compute.activation_checkpointing == "selective":
        raise ConfigError(
            'compute.activation_checkpointing "selective" keeps results of products, to which adapters add theirs; '
            'beside an [adapter] choose "full" or "off".'
        )
    if config.adapter is not None and compute.precision != ComputeConfig.precision:
        raise ConfigError(
            f"compute.precision {shown(compute.precision)} is for training all weights, but there is an [adapter], "
            'which has a precision of its own; set adapter.precision = "bf16" instead.'
        )


def check_model(config: FinetuneConfig, model: ModelConfig) -> None:
    """Refuse what the starting checkpoint cannot be trained with."""
    if config.data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length {config.data.sequence_length} exceeds the {model.max_position_embeddings} positions "
            "of the model; lower it."
        )
    if model.attention_dropout:
        raise ConfigError(
            f"The model's attention_dropout is {model.attention_dropout}, but OLMoE trains without it; set it to 0 in "
            "its config.json."
        )


def _check(config: FinetuneConfig) -> None:
    if not config.run.initialize_from:
        raise ConfigError("run.initialize_from is missing; name the checkpoint to fine-tune, a folder or a hub id.")
    if not config.run.output:
        raise ConfigError("run.output is empty; name the folder that the run writes into.")
    if not config.data.train:
        raise ConfigError("data.train is empty; name at least one file to train on.")
    if config.run.peak_flops is not None:
        raise ConfigError(
            "run.peak_flops is for the MFU of olmoe train, which fine-tuning does not measure; remove it."
        )
    for source in config.data.valid:
        if source.repeat != 1:
            raise ConfigError(f"{source.path!r} is not trained on, so its repeat means nothing; remove it.")
    _check_choices(config)
    _check_adapter(config)
    _check_compute(config)
    positive: dict[str, float] = {
        "data.sequence_length": config.data.sequence_length,
        "batch.sequences": config.batch.sequences,
        "batch.accumulation": config.batch.accumulation,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.eps": config.optimizer.eps,
        "optimizer.max_grad_norm": config.optimizer.max_grad_norm,
        "evaluation.every_steps": config.evaluation.every_steps,
        "evaluation.answer_tokens": config.evaluation.answer_tokens,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "parallel.data": 1 if config.parallel.data is None else config.parallel.data,
        "parallel.expert": config.parallel.expert,
        "parallel.replicate": config.parallel.replicate,
    }
    counts = {"schedule.epochs": config.schedule.epochs}
    counts |= {f"repeat of {source.path!r}": source.repeat for source in config.data.train}
    not_negative: dict[str, float] = {
        "run.seed": config.run.seed,
        "schedule.final_fraction": config.schedule.final_fraction,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.answers": config.evaluation.answers,
    }
    if config.adapter is not None:
        positive |= {"adapter.alpha": config.adapter.alpha}
        counts |= {"adapter.rank": config.adapter.rank}
    if isinstance(config, SFTConfig):
        check_dropout(config.residual_dropout)
        not_negative |= {"loss.load_balancing": config.loss.load_balancing, "loss.router_z": config.loss.router_z}
    if isinstance(config, PreferenceConfig):
        positive |= {"loss.beta": config.loss.strength}
        not_negative |= {"loss.desirable_weight": config.loss.desirable_weight}
        not_negative |= {"loss.undesirable_weight": config.loss.undesirable_weight}
    check_ranges(positive=positive, not_negative=not_negative, counts=counts)
    for share in (*config.optimizer.betas, config.schedule.warmup):
        if not 0 <= share < 1:
            raise ConfigError(f"optimizer.betas and schedule.warmup must be from 0 to below 1, not {shown(share)}.")


def _check_choices(config: FinetuneConfig) -> None:
    """Each key that is one of several words."""
    choices: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "data.turns": ((config.data.turns,), TURNS),
        "data.too_long": ((config.data.too_long,), TOO_LONG),
        "optimizer.kind": ((config.optimizer.kind,), ("adamw", "rmsprop")),
        "schedule.kind": ((config.schedule.kind,), SCHEDULES),
        "parallel.balance": ((config.parallel.balance,), ("rank", "all")),
        "compute.precision": ((config.compute.precision,), PRODUCTS),
        "compute.activation_checkpointing": ((config.compute.activation_checkpointing,), RECOMPUTATION),
    }
    if config.adapter is not None:
        choices["adapter.targets"] = (config.adapter.targets or ("",), TARGETS)
        choices["adapter.precision"] = ((config.adapter.precision,), PRECISIONS)
    if isinstance(config, SFTConfig):
        choices["loss.reduce"] = ((config.loss.reduce,), REDUCTIONS)
    if isinstance(config, PreferenceConfig):
        choices["loss.kind"] = ((config.loss.kind,), LOSSES)
    for key, (values, known) in choices.items():
        for value in values:
            if value not in known:
                raise ConfigError(f"{key} must be {', '.join(known[:-1])} or {known[-1]}, not {shown(value)}.")
