"""The mean of several checkpoints of one architecture ("souping"): what their runs have in common, minus their noise.

OLMoE's second release is such a mean, of three annealing runs (OLMoE 0125).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from olmoe.errors import CheckpointError, shown
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.source import WeightSource

# The ids that start, end and pad a text do not affect the computation.
_FREE = {"bos_token_id", "eos_token_id", "pad_token_id"}


class Average:
    """A `WeightSource` of means, computed one matrix at a time in fp64 and rounded once to fp32."""

    def __init__(self, sources: Sequence[WeightSource]) -> None:
        """Raises `CheckpointError` if there are fewer than two, or if their architectures differ."""
        if len(sources) < 2:
            raise CheckpointError("An average needs at least two checkpoints; name another.")
        self._sources = sources
        self.config = sources[0].config
        for other in sources[1:]:
            for field in fields(self.config):
                a, b = getattr(self.config, field.name), getattr(other.config, field.name)
                if a != b and field.name not in _FREE:
                    raise CheckpointError(
                        f"{sources[0].path} has {field.name} {shown(a)}, but {other.path} {shown(b)}; only checkpoints "
                        "of one architecture can be averaged."
                    )

    @property
    def path(self) -> Path:
        """The first checkpoint, from which the tokenizer comes."""
        return self._sources[0].path

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        total = self._sources[0].read(parameter, expert).double()
        for source in self._sources[1:]:
            total += source.read(parameter, expert)
        return (total / len(self._sources)).float()

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return self._sources[0].files()


def open_average(names: Sequence[str], *, local_files_only: bool = False) -> tuple[Average, torch.dtype]:
    """The average of checkpoints, given as folders or hub ids, and the widest dtype that they are stored in.

    Raises `CheckpointError` for packed ones, whose weights are rounded.
    """
    found = [Checkpoint.open(name, local_files_only=local_files_only) for name in names]
    for name, checkpoint in zip(names, found, strict=True):
        if checkpoint.layout is not None:
            raise CheckpointError(
                f"{name} is packed, so its weights are rounded; give the checkpoint it was packed from."
            )
    dtypes = {dtype for checkpoint in found for dtype in checkpoint.dtypes}
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
    dtype = narrow.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32
    return Average([checkpoint.source() for checkpoint in found]), dtype
