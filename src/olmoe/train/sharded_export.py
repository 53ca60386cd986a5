"""Writes a sharded model as an ordinary checkpoint folder: one parameter at a time, on the first rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from olmoe.model import CausalLM
from olmoe.train.ranks import Ranks
from olmoe.train.shards import whole
from olmoe.weights import export, generation
from olmoe.weights.names import EMBEDDING, parameter_shapes
from olmoe.weights.to_folder import write_weights


def export_sharded(model: CausalLM, folder: Path, ranks: Ranks, extra_files: dict[str, str]) -> None:
    """Write what `export.save` writes for a plain model, replacing an older one. All ranks call it together."""
    gathered = _gather(model)

    def write() -> None:
        try:
            with export.replaced_folder(folder, extra_files, overwrite=True) as temporary:
                write_weights(_Gathered(model, folder, gathered), temporary, torch.float32)
                text = generation.generation_text(model.config)
                (temporary / generation.FILE_NAME).write_text(text, encoding="utf-8")
        finally:
            for _ in gathered:  # the others gather everything, whatever happened here
                pass

    if not ranks.is_first:
        for _ in gathered:
            pass
    ranks.on_first(write)


def _gather(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as a whole, by name; all ranks advance together."""
    parameters = dict(model.named_parameters())
    for name in parameter_shapes(model.config):
        yield name, whole(parameters[name].detach()).cpu()


class _Gathered:
    """A `WeightSource` of parameters as they come. They are read in the order of `parameter_shapes`."""

    def __init__(self, model: CausalLM, path: Path, gathered: Iterator[tuple[str, Tensor]]) -> None:
        self.config, self.path = model.config, path
        self._gathered = gathered
        self._held: dict[str, Tensor] = {}

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        while parameter not in self._held:
            name, value = next(self._gathered)
            # Tied embeddings are read a second time, as the output head.
            self._held = {name: value} | {n: v for n, v in self._held.items() if n == EMBEDDING}
        value = self._held[parameter]
        return value if expert is None else value[expert]

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return {}
