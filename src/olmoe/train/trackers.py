"""Programs that show a run's metrics while it runs: TensorBoard and Weights & Biases, if they are installed.

They get what metrics.jsonl gets, which stays the run's own record: numbers by name, one number for each entry of a list
by layer, and for expert loads how far the busiest expert of each layer is above the mean.
"""

from __future__ import annotations

import importlib.util
import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from olmoe.errors import ConfigError, UserError
from olmoe.io.text_file import read_text
from olmoe.train.config import LogConfig
from olmoe.train.run_folder import TENSORBOARD, WANDB_ID


class Tracker(Protocol):
    """Where numbers go besides metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a record."""
        ...

    def close(self, failed: bool) -> None:
        """End; `failed` says that the run did not come to its end."""
        ...


def check_installed(log: LogConfig) -> None:
    """Raise `ConfigError` for a program that is requested but not installed."""
    wanted = {"tensorboard": ("tensorboard", log.tensorboard), "wandb": ("wandb", log.wandb is not None)}
    for key, (package, asked) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(f"log.{key} needs the package {package}; pip install {package}, or leave the key out.")


@contextmanager
def open_trackers(log: LogConfig, output: Path, step: int, settings: dict[str, Any]) -> Iterator[list[Tracker]]:
    """What a configuration asks for, for a run in `output` that goes on after `step`; it is closed with the block.

    `settings` are shown beside the run. Raises `UserError` for a program that does not start.
    """
    check_installed(log)
    opened: list[Tracker] = []
    with ExitStack() as stack:

        def add(tracker: Tracker) -> None:
            opened.append(tracker)
            stack.push(lambda kind, error, trace: tracker.close(failed=error is not None))

        if log.tensorboard:
            add(_TensorBoard(output, step))
        if log.wandb is not None:
            add(_WeightsAndBiases(log.wandb, output, step, settings))
        yield opened


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics record by a name each, without counters and without what is no finite number."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if name in ("step", "tokens", "answers"):  # answers of fine-tuning are texts
            continue
        if name == "expert_load":
            name, value = "expert_load_max_over_mean", [max(layer) * len(layer) / sum(layer) for layer in value]
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": part for key, part in value.items()}
        elif isinstance(value, list):
            width = len(str(len(value) - 1))
            found |= {f"{name}/layer-{layer:0{width}}": part for layer, part in enumerate(value)}
        else:
            found[name] = value
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


class _TensorBoard:
    """Event files under the run's folder. What an interrupted run wrote after its checkpoint is not shown again."""

    def __init__(self, output: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One run of a project there, which a resumed run continues."""

    def __init__(self, project: str, output: Path, step: int, settings: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        file = output / WANDB_ID
        if step == 0 or not file.is_file():
            file.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=output.name,
                id=read_text(file).strip(),
                resume="allow",
                dir=str(output),
                config=settings,
            )
        except Exception as error:  # of many kinds: no account, no network, a refused project
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            raise UserError(
                f"Weights & Biases does not start ({reason}); log in with `wandb login`, set WANDB_MODE=offline, or "
                "leave log.wandb out."
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
