"""`TrainConfig`: everything that decides a training run, read from one TOML file.

Every unknown key, wrong type and contradictory value is refused with its place in the file.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmoe.config import ModelConfig, RopeParameters
from olmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A text file (documents separated by lines of `<|endoftext|>`) or a token file (`.npy`, raw uint16).

    `repeat` is how often an epoch passes over it; a fraction takes that share of its windows, drawn anew
    each epoch.
    """

    path: str
    repeat: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. Paths are relative to the configuration file.

    `valid` is held out, evaluated during training, and decides which checkpoint is best; `measure` is only
    measured at the end.
    """

    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    measure: tuple[Source, ...] = ()
    sequence_length: int = 4096
    tokens_folder: str = "data"  # where token files and their descriptions are kept


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
class BatchConfig:
    """Sequences a step: `sequences` at a time, `accumulation` times."""

    sequences: int
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out evaluation during training: how often, and how many windows of each file (0: all)."""

    every_steps: int = 500
    windows: int = 64


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resumable checkpoints: how often, and how many to keep. The best by held-out loss is kept besides."""

    every_steps: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run writes, its seed, and the CPU threads it uses."""

    output: str
    seed: int = 6198
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run. `base` is the folder that its relative paths start from."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    batch: BatchConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    base: Path = Path()

    @property
    def tokens_per_step(self) -> int:
        """Positions that one optimizer step sees."""
        return self.batch.sequences * self.batch.accumulation * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Steps until `schedule.total_tokens` are seen."""
        return -(-self.schedule.total_tokens // self.tokens_per_step)

    def resolve(self, path: str) -> Path:
        """A path of the configuration as seen from the current folder."""
        return self.base / path

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation."""
        sections = ("model", "data", "batch", "optimizer", "schedule", "loss")
        plain = {name: dataclasses.asdict(getattr(self, name)) for name in sections}
        return plain | {"seed": self.run.seed}


def load_config(path: str | Path) -> TrainConfig:
    """Read and check a TOML file. Raises `ConfigError` with the offending place and value."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no training configuration {path}.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ConfigError(f"{path} is not a text file; give the path of a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    model = dict(raw.get("model", {}))
    if isinstance(model.get("rope"), dict):
        model["rope"] = _build(RopeParameters, model["rope"], "model.rope")
    raw = raw | {"model": _build(ModelConfig, model, "model")}
    config: TrainConfig = _build(TrainConfig, raw | {"base": path.parent}, "")
    _check(config)
    return config


def _check(config: TrainConfig) -> None:
    positive = {
        "data.sequence_length": config.data.sequence_length,
        "batch.sequences": config.batch.sequences,
        "batch.accumulation": config.batch.accumulation,
        "schedule.total_tokens": config.schedule.total_tokens,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.max_grad_norm": config.optimizer.max_grad_norm,
        "evaluation.every_steps": config.evaluation.every_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for place, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{place} must be above 0, not {value!r}.")
    for source in (*config.data.train, *config.data.valid):
        if not source.repeat > 0:
            raise ConfigError(f"repeat of {source.path!r} must be above 0, not {source.repeat!r}.")
    if not config.data.train:
        raise ConfigError("data.train is empty; name at least one file to train on.")
    if config.data.sequence_length > config.model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length {config.data.sequence_length} exceeds model.max_position_embeddings "
            f"{config.model.max_position_embeddings}."
        )
    if config.schedule.kind not in ("cosine", "linear"):
        raise ConfigError(f"schedule.kind must be cosine or linear, not {config.schedule.kind!r}.")
    if config.schedule.warmup_tokens >= config.schedule.total_tokens:
        raise ConfigError(
            f"schedule.warmup_tokens {config.schedule.warmup_tokens} must be below total_tokens "
            f"{config.schedule.total_tokens}."
        )


def _build(cls: Any, table: Any, place: str) -> Any:
    """A dataclass from a TOML table, nested ones included."""
    where = f"[{place}]" if place else "the configuration"
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table, not {table!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ConfigError(f"Unknown key {unknown[0]!r} in {where}; known are {', '.join(sorted(known))}.")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in table:
            raise ConfigError(f"{where} lacks {name!r}.")
    values = {key: _convert(hints[key], value, f"{place}.{key}".lstrip(".")) for key, value in table.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, place: str) -> Any:
    """`value` as the annotated type, or `ConfigError`."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, place)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(option, value, place)
            except ConfigError:
                continue
        raise ConfigError(f"{place} has the value {value!r} of the wrong type.")
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{place}[{i}]") for i, v in enumerate(value))
        if len(value) == len(arguments):
            return tuple(_convert(h, v, f"{place}[{i}]") for i, (h, v) in enumerate(zip(arguments, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{place} must be of type {getattr(hint, '__name__', hint)}, not {value!r}.")
