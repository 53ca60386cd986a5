"""`TrainConfig`: everything that decides a training run, read from one TOML file.

Every unknown key, wrong type and contradictory value is refused with its key in the file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError, shown
from olmoe.train.inheritance import inherit
from olmoe.train.ranges import check_ranges
from olmoe.train.toml_file import build, read_toml, resolve_path

BF16_PRODUCTS = "bf16-products"
PRODUCTS = ("fp32", "bf16", BF16_PRODUCTS)  # compute.precision
RECOMPUTATION = ("off", "selective", "full")  # compute.activation_checkpointing


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text (documents separated by lines with `<|endoftext|>`), JSONL (`text` or `messages`), or token ids (`.npy`).

    `repeat` is how often an epoch passes over it; a fraction takes that share of its windows, redrawn
    each epoch. `weight` says instead which share of the windows comes from it, relative to the weights of the others.
    `dtype` is the type of the ids in a token file without a header, if they are not uint16.
    """

    path: str
    repeat: float = 1.0
    weight: float | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. Paths are relative to the configuration file.

    `valid` is held out, evaluated during training, and decides which checkpoint is best; `measure` is only
    measured at the end. With `document_mask` the documents of a window are isolated (see `document_mask`), in
    evaluation too; without it, attention crosses documents, as in OLMoE's training. With `mask_repetitions` a window
    in which an n-gram occurs that many times in a row trains no prediction (see `repetitions`; OLMoE: 32).
    """

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    measure: tuple[Source, ...] = ()
    sequence_length: int = 4096
    document_mask: bool = False
    mask_repetitions: int = 0
    tokens_folder: str = "data"  # where token files and their descriptions are kept

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, for whatever purpose."""
        return (*self.train, *self.valid, *self.measure)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer file; if it does not exist, a byte-level BPE of `vocab_size` entries is trained into it."""

    path: str
    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW on all parameters, norms, embeddings and router included (OLMoE's recipe)."""

    learning_rate: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over tokens: linear warm-up from a tenth of the peak, then cosine or linear decay."""

    kind: str = "cosine"
    total_tokens: int
    warmup_tokens: int = 0
    final_fraction: float = 0.1  # of the peak, at total_tokens


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of OLMoE's auxiliary losses (see `losses`)."""

    load_balancing: float = 0.01
    router_z: float = 0.001


@dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """Prevents a small corpus from being memorised (see `dropout`). OLMoE's own training has no dropout."""

    residual_dropout: float = 0.0  # share of the embeddings' and each block's outputs that a step leaves out


@dataclass(frozen=True, kw_only=True)
class SharedExpertConfig:
    """For experiments: an expert of this width that all tokens use beside the chosen ones (see `shared_expert`)."""

    width: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sequences per step: `sequences` at a time, on all ranks together, `accumulation` times.

    So n ranks compute what one process does with `sequences` / n and `accumulation` x n.
    """

    sequences: int
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the `data` x `expert` processes that torchrun starts share a run (see `sharding`).

    Dense parameters are sharded over all; experts are shared by `expert` ranks. `data` None takes all that there are.
    `replicate` keeps that many copies of everything, each sharded over data / replicate x expert ranks. The load that
    load balancing uses is that of each `rank` (as in OLMoE's training) or that of `all`.
    """

    data: int | None = None
    expert: int = 1
    replicate: int = 1
    balance: str = "rank"

    def ranks(self, started: int) -> int:
        """The number of processes that this setting needs, given that `started` are running."""
        return (self.data or max(1, started // self.expert)) * self.expert


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed: the dtype of products and activations, what backward recomputes, and compilation.

    Weights, gradients' sums and the optimizer stay in fp32; so do activations with `bf16-products` (see `precision`).
    """

    precision: str = "fp32"
    activation_checkpointing: str = "off"
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """Steps to leave out (see `skipping`): beyond `sigmas` standard deviations of the last `window` steps (0: none).

    After more than `limit` of them in a row the run ends.
    """

    sigmas: float = 6.0
    window: int = 128
    limit: int = 16


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: how often during training, how many windows of each file then, and at the end (0: all)."""

    every_steps: int = 500
    windows: int = 64
    final_windows: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resumable checkpoints: how often, and how many to keep. The best by held-out loss is kept in addition."""

    every_steps: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Programs that show the metrics besides `metrics.jsonl`: TensorBoard, and a project of Weights & Biases."""

    tensorboard: bool = False
    wandb: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run writes, its seed, and the CPU threads it uses.

    `initialize_from` is a checkpoint (a folder or a hub id) whose weights the run starts from, in place of random
    ones; the optimizer and the schedule start again. It brings its architecture and its tokenizer, so that `[model]`
    and `[tokenizer]` need only hold what differs. `peak_flops` is what one device can do per second, for MFU (see
    `throughput`); it is measured if not given.
    """

    output: str
    initialize_from: str | None = None
    seed: int = 6198
    threads: int | None = None
    device: str = "auto"
    peak_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run. `base` is the folder that its relative paths start from.

    `eos_is_written` is False if the tokenizer determines which id ends a document.
    """

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    shared_expert: SharedExpertConfig = field(default_factory=SharedExpertConfig)
    skip: SkipConfig = field(default_factory=SkipConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    base: Path = field(default=Path(), metadata={"in_file": False})
    eos_is_written: bool = field(default=True, metadata={"in_file": False})

    @property
    def tokens_per_step(self) -> int:
        """Positions that one optimizer step sees."""
        return self.batch.sequences * self.batch.accumulation * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps until `schedule.total_tokens` are seen."""
        return -(-self.schedule.total_tokens // self.tokens_per_step)

    @property
    def mask_eos_id(self) -> int | None:
        """The id that ends documents, if attention must stay within them."""
        return self.model.eos_token_ids[0] if self.data.document_mask else None

    def resolve(self, path: str) -> Path:
        """A path of the configuration as seen from the current folder; see `resolve_path`."""
        return resolve_path(path, self.base)

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        sections = ("model", "data", "batch", "optimizer", "schedule", "loss", "regularization")
        plain = {name: dataclasses.asdict(getattr(self, name)) for name in sections}
        for source in [s for group in ("train", "valid", "measure") for s in plain["data"][group]]:
            for key in ("dtype", "weight"):
                if source[key] is None:  # unknown to older versions, whose runs must still resume
                    del source[key]
        for key in ("document_mask", "mask_repetitions"):
            if not plain["data"][key]:  # likewise
                del plain["data"][key]
        if self.shared_expert.width:  # likewise
            plain["shared_expert"] = dataclasses.asdict(self.shared_expert)
        how = {"precision": self.compute.precision, "balance": self.parallel.balance}
        return plain | how | {"seed": self.run.seed}


def load_config(path: str | Path, *, resume: bool = False) -> TrainConfig:
    """Read and check a TOML file. Raises `ConfigError` with the offending key and value.

    With `resume`, what the file leaves to the checkpoint that it starts from comes from the run itself; see
    `inheritance`.
    """
    path = Path(path)
    raw = read_toml(path)
    schedule = raw.get("schedule")
    if "adapter" in raw or (isinstance(schedule, dict) and "epochs" in schedule):
        part = "[adapter]" if "adapter" in raw else "schedule.epochs"
        raise ConfigError(f"{part} is for fine-tuning, which olmoe sft and olmoe dpo do; olmoe train does not know it.")
    base = path.parent
    written = raw.get("model")
    raw = inherit(raw, lambda p: resolve_path(p, base), resume, lambda table: build(ModelConfig, table, "model"))
    eos_is_written = not isinstance(written, dict) or "eos_token_id" in written or raw["model"] is not written
    config: TrainConfig = dataclasses.replace(build(TrainConfig, raw, ""), base=base, eos_is_written=eos_is_written)
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    """Refuse values of the right type that cannot make a training run."""
    _check_ranges(config)
    _check_paths(config)
    _check_model(config)
    _check_data(config.data)
    _check_choices(config)
    schedule = config.schedule
    if schedule.warmup_tokens >= schedule.total_tokens:
        raise ConfigError(
            f"schedule.warmup_tokens {schedule.warmup_tokens} must be below schedule.total_tokens "
            f"{schedule.total_tokens}."
        )


def _check_choices(config: TrainConfig) -> None:
    """Check each key that is one of several words."""
    compute = config.compute
    choices = {
        "schedule.kind": (config.schedule.kind, ("cosine", "linear")),
        "parallel.balance": (config.parallel.balance, ("rank", "all")),
        "compute.precision": (compute.precision, PRODUCTS),
        "compute.activation_checkpointing": (compute.activation_checkpointing, RECOMPUTATION),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{key} must be {', '.join(known[:-1])} or {known[-1]}, not {shown(value)}.")
    if compute.compile and config.regularization.residual_dropout:
        raise ConfigError(
            "compute.compile and regularization.residual_dropout exclude each other, because dropout hooks into "
            "what is compiled; leave out one."
        )
    if compute.compile and config.data.document_mask:
        raise ConfigError(
            "compute.compile and data.document_mask exclude each other, because every window has documents of other "
            "lengths, for which layers would be recompiled; leave out one."
        )


def _check_ranges(config: TrainConfig) -> None:
    """Check each number by itself."""
    data, optimizer, schedule = config.data, config.optimizer, config.schedule
    positive: dict[str, float] = {
        "data.sequence_length": data.sequence_length,
        "batch.sequences": config.batch.sequences,
        "batch.accumulation": config.batch.accumulation,
        "schedule.total_tokens": schedule.total_tokens,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.eps": optimizer.eps,
        "optimizer.max_grad_norm": optimizer.max_grad_norm,
        "evaluation.every_steps": config.evaluation.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "run.peak_flops": 1.0 if config.run.peak_flops is None else config.run.peak_flops,
        "skip.window": config.skip.window,
        "skip.limit": config.skip.limit,
        "parallel.data": 1 if config.parallel.data is None else config.parallel.data,
        "parallel.expert": config.parallel.expert,
        "parallel.replicate": config.parallel.replicate,
        "batch.sequences x batch.accumulation x data.sequence_length": config.tokens_per_step,
    }
    positive |= {f"weight of {source.path!r}": source.weight for source in data.sources if source.weight is not None}
    not_negative: dict[str, float] = {
        "run.seed": config.run.seed,
        "schedule.warmup_tokens": schedule.warmup_tokens,
        "schedule.final_fraction": schedule.final_fraction,
        "optimizer.weight_decay": optimizer.weight_decay,
        "loss.load_balancing": config.loss.load_balancing,
        "loss.router_z": config.loss.router_z,
        "shared_expert.width": config.shared_expert.width,
        "evaluation.windows": config.evaluation.windows,
        "evaluation.final_windows": config.evaluation.final_windows,
        "data.mask_repetitions": data.mask_repetitions,
        "skip.sigmas": config.skip.sigmas,
    }
    repeats = {f"repeat of {source.path!r}": source.repeat for source in data.sources}
    check_ranges(positive=positive, not_negative=not_negative, counts=repeats)
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(f"optimizer.betas must be from 0 to below 1, not {list(optimizer.betas)}.")
    check_dropout(config.regularization.residual_dropout)


def check_dropout(share: float) -> None:
    """Refuse a dropout share that is out of range."""
    if not 0 <= share < 1:
        raise ConfigError(f"regularization.residual_dropout must be from 0 to below 1, not {shown(share)}.")


def _check_paths(config: TrainConfig) -> None:
    """Check what is read and written."""
    data = config.data
    if not config.run.output:
        raise ConfigError("run.output is empty; name the folder that the run writes into.")
    if not data.train:
        raise ConfigError("data.train is empty; name at least one file to train on.")
    for path in (config.run.output, config.tokenizer.path, data.tokens_folder, *(s.path for s in data.sources)):
        config.resolve(path)


def _check_data(data: DataConfig) -> None:
    """Check that the settings of the sources fit together."""
    weighted = [source for source in data.train if source.weight is not None]
    for source in (*data.valid, *data.measure):
        key = "weight" if source.weight is not None else "repeat"
        if key == "weight" or source.repeat != 1:
            raise ConfigError(f"{source.path!r} is not trained on, so its {key} means nothing; remove it.")
    for source in weighted:
        if source.repeat != 1:
            raise ConfigError(f"{source.path!r} has both repeat and weight, which say the same; remove one of them.")
    if weighted and len(weighted) < len(data.train):
        other = next(source.path for source in data.train if source.weight is None)
        raise ConfigError(f"{weighted[0].path!r} has a weight and {other!r} has none; give all of data.train one.")
    if data.mask_repetitions == 1:
        raise ConfigError("data.mask_repetitions must be 0 or at least 2, not 1: everything occurs once.")


def _check_model(config: TrainConfig) -> None:
    """Check that model, tokenizer and windows of the data fit each other, and what training supports."""
    length = config.data.sequence_length
    if config.eos_is_written and not config.model.eos_token_ids:
        raise ConfigError("model.eos_token_id is needed for training: it ends each document.")
    if (config.tokenizer.vocab_size or 0) > config.model.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size {config.tokenizer.vocab_size} exceeds model.vocab_size {config.model.vocab_size}."
        )
    if length < 2:
        raise ConfigError("data.sequence_length must be at least 2: a window of T ids trains T - 1 predictions.")
    if length > config.model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length {length} exceeds model.max_position_embeddings "
            f"{config.model.max_position_embeddings}; lower the one or raise the other."
        )
    if config.model.attention_dropout:
        raise ConfigError(
            f"model.attention_dropout is {config.model.attention_dropout}, but OLMoE trains without it; remove it, or "
            "set regularization.residual_dropout."
        )
