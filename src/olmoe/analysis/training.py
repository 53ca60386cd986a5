"""Routing during training: the records of a run's metrics.jsonl as arrays, for plots of how experts take up their load.

Shapes legend: S steps, L layers, E experts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from olmoe.errors import UserError


class TrainingLoad(NamedTuple):
    """How many tokens each expert of each layer received in each step, `counts` (S, L, E).

    `steps` (S,) are the numbers of the steps, `tokens` (S,) those that training had seen after each.
    `metrics.balance(counts[i])` says how evenly a step used its experts; sums over steps are loads as well.
    """

    steps: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int32]


def read_load(path: str | Path, every: int = 1) -> TrainingLoad:
    """The loads that `olmoe train` recorded, of every so many steps.

    `path` is a run's folder, or its metrics.jsonl, which may still grow. Raises `UserError` for a file without such
    records.
    """
    path = Path(os.path.expanduser(path))
    path = path / "metrics.jsonl" if path.is_dir() else path
    steps, tokens, counts = [], [], []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):  # it is being written
                    break
                record = json.loads(line)
                if "expert_load" in record and record["step"] % every == 0:
                    steps.append(record["step"])
                    tokens.append(record["tokens"])
                    counts.append(np.asarray(record["expert_load"], dtype=np.int32))
        stacked = np.stack(counts) if counts else None
    except OSError as error:
        raise UserError(f"The metrics {path} cannot be read ({error.strerror}); give the folder of a run.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the metrics of a run ({error}).") from None
    if stacked is None:
        raise UserError(f"{path} has no step with the load of experts; train with this version of olmoe.")
    return TrainingLoad(np.array(steps, dtype=np.int64), np.array(tokens, dtype=np.int64), stacked)
