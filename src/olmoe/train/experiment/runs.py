"""The training runs of an experiment: a folder each, with a configuration that `olmoe train` also takes.

`OUTPUT/ARM/seed-N/run.toml` is that configuration; what the trainer writes is beside it. Runs of the same seed see
the same windows in the same order, whatever their arm.
"""

from __future__ import annotations

import json
import math
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError, UserError, shown
from olmoe.io.atomic import write_text
from olmoe.io.text_file import read_text
from olmoe.train.config import TrainConfig, load_config
from olmoe.train.experiment.definition import Arm, Experiment, Tables
from olmoe.train.run_folder import latest

FILE = "run.toml"
RESULT = "evaluation.json"  # what the trainer writes last
# Added to the seed of a run that starts from another one, so that it does not see the same windows again.
STAGE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: an arm with a seed. `earlier` is the run that it starts from, if any."""

    arm: Arm
    seed: int
    folder: Path
    tables: Tables
    config: TrainConfig
    earlier: Run | None

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def start(self) -> Path:
        """The checkpoint that it starts from, if there is an earlier run."""
        return Path(str(self.config.run.initialize_from))

    @property
    def is_finished(self) -> bool:
        """Whether it was trained and evaluated."""
        return (self.folder / RESULT).is_file()

    @property
    def has_begun(self) -> bool:
        """Whether it has output that other settings would contradict."""
        return self.is_finished or latest(self.folder) is not None

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        return self.config.total_steps * self.config.tokens_per_step

    @property
    def tokens_before(self) -> int:
        """Tokens that its model had been trained on before it started."""
        return 0 if self.earlier is None else self.earlier.tokens_before + self.earlier.tokens

    def records(self) -> Iterator[dict[str, Any]]:
        """What the trainer recorded, step by step."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # being written, or cut short by a kill
                continue
            yield record


def lay_out(experiment: Experiment, output: Path, seeds: int, scale: float = 1.0) -> list[Run]:
    """The runs of all arms with the seeds from 1 to `seeds`, seed by seed, each after the one it starts from.

    `scale` makes all of them shorter or longer: tokens, warm-up and evaluation intervals. Raises `ConfigError`
    for an invalid training configuration, before anything is written.
    """
    if seeds < 1:
        raise ConfigError(f"An experiment needs at least 1 seed, not {seeds}.")
    if not 0 < scale < math.inf:
        raise ConfigError(f"The scale must be above 0, not {scale}.")
    runs: list[Run] = []
    for seed in range(1, seeds + 1):
        of_seed: dict[str, Run] = {}
        for arm in experiment.arms.values():
            of_seed[arm.name] = _run(arm, seed, output, scale, of_seed.get(arm.start or ""))
        runs += of_seed.values()
    return runs


def _run(arm: Arm, seed: int, output: Path, scale: float, earlier: Run | None) -> Run:
    folder = output / arm.name / f"seed-{seed}"
    tables = {name: dict(table) for name, table in arm.tables.items()}
    tables["run"] |= {"output": str(folder.absolute()), "seed": seed}
    if earlier is not None:
        start = _upcycled(folder) if arm.upcycle else earlier.folder / "best"
        tables["run"] |= {"seed": earlier.config.run.seed + STAGE, "initialize_from": str(start.absolute())}
    _rescale(tables, scale)
    path = folder / FILE
    try:
        config = _checked(tables, path)
    except UserError as error:
        raise ConfigError(f"The arm {arm.name!r} is not a valid training run: {error}") from None
    return Run(arm=arm, seed=seed, folder=folder, tables=tables, config=config, earlier=earlier)


def _upcycled(folder: Path) -> Path:
    """Where the mixture of experts is that a run starts from: beside the run, which may not start in its own folder."""
    return folder.parent / "start" / folder.name


def _rescale(tables: Tables, scale: float) -> None:
    if scale == 1:
        return
    for section, key, least in (
        ("schedule", "total_tokens", 1),
        ("schedule", "warmup_tokens", 0),
        ("evaluation", "every_steps", 1),
    ):
        value = tables.get(section, {}).get(key)
        if isinstance(value, int):
            tables[section][key] = max(least, round(value * scale))


def _checked(tables: Tables, path: Path) -> TrainConfig:
    """The configuration in these tables, checked like the trainer's; `path` is where it will be written."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / FILE
        temporary.write_text(to_toml(tables), encoding="utf-8")
        return load_config(temporary)


def check_settings(run: Run) -> None:
    """Raise `ConfigError` if a run was started with other settings than the experiment has for it now."""
    path = run.folder / FILE
    if not run.has_begun or not path.is_file():
        return
    was, now = _settings(tomllib.loads(read_text(path))), _settings(run.tables)
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"{path} was trained with {name} = {shown(was.get(name))}, and not {shown(now.get(name))} as the "
                "experiment says now; give the --scale of then, another --output, or remove that folder."
            )


def write_configuration(run: Run) -> None:
    """Write the run's configuration. Raises `ConfigError` if it was started with other settings."""
    check_settings(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{run.folder} cannot be a folder ({error.strerror}); choose another --output.") from None
    write_text(run.folder / FILE, to_toml(run.tables))


def _settings(tables: Tables) -> dict[str, Any]:
    """What decides a result, by names: without places, which may change, and what no result depends on."""
    free = {("run", "output"), ("run", "threads"), ("run", "initialize_from"), ("data", "tokens_folder")}
    free |= {("tokenizer", "path"), ("checkpoint", "every_steps"), ("checkpoint", "keep")}
    settings = {
        f"{section}.{key}": value
        for section, table in tables.items()
        for key, value in table.items()
        if (section, key) not in free
    }
    for group in ("data.train", "data.valid", "data.measure"):
        settings[group] = [s | {"path": Path(s["path"]).name} for s in settings.get(group, [])]
    return settings


def to_toml(tables: Tables) -> str:
    """Tables of plain values as TOML."""
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(v)}" for key, v in value.items()) + " }"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return str(value).lower() if isinstance(value, bool) else str(value)
