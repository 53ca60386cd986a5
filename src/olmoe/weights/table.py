"""`TensorTable`: every parameter of a model and how a checkpoint stores it. The schema for packing, checking, reading.

It follows from the architecture and a layout alone; no module is built for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.io.tensor_file import TensorFiles
from olmoe.quant import Format, Layout
from olmoe.quant.modules import part_name
from olmoe.weights.names import DOWN, EMBEDDING, EXPERTS, GATE_UP, HEAD, parameter_shapes

# Parameters of a layer in the network's order, which is the order of files.
_ATTENTION = tuple(f"self_attn.{which}_proj" for which in "qkvo")
_LAYER = (
    "input_layernorm.weight",
    *(f"{projection}.{leaf}" for projection in _ATTENTION for leaf in ("weight", "bias")),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    "mlp.gate.weight",
    f"{EXPERTS}.{GATE_UP}",
    f"{EXPERTS}.{DOWN}",
)
_PACKABLE = (EMBEDDING, HEAD, *(f".{name}.weight" for name in _ATTENTION), f".{GATE_UP}", f".{DOWN}")


@dataclass(frozen=True)
class Row:
    """A parameter: its shape, (R, C) or (n,), in a stack that of one of `experts`; and its format, None if plain."""

    name: str
    shape: tuple[int, ...]
    experts: int | None
    format: Format | None

    @property
    def first_expert(self) -> int | None:
        """0 for a stack, which is read one expert at a time; None otherwise."""
        return None if self.experts is None else 0

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return math.prod(self.shape) * (self.experts or 1)

    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype of every tensor that stores it, by name; None is any floating dtype."""
        stack = () if self.experts is None else (self.experts,)
        if self.format is None:
            return {self.name: (stack + self.shape, None)}
        rows, columns = self.shape
        parts = self.format.parts(rows, columns)
        return {part_name(self.name, part): (stack + shape, dtype) for part, (shape, dtype) in parts.items()}

    def read(self, files: TensorFiles, expert: int | None = None) -> Tensor:
        """Its values as a floating tensor, fp32 if it is packed; for a stack, those of one `expert`."""

        def stored(name: str) -> Tensor:
            value = files.tensor(name)
            return value if expert is None else value[expert]

        if self.format is None:
            return stored(self.name)
        rows, columns = self.shape
        parts = {part: stored(part_name(self.name, part)) for part in self.format.parts(rows, columns)}
        return self.format.decode(parts, rows, columns, torch.float32)


class TensorTable(Mapping[str, Row]):
    """Rows by the names of parameters, in the network's order."""

    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        shapes = parameter_shapes(config)
        layers = (f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in _LAYER)
        names = (EMBEDDING, *layers, "model.norm.weight", HEAD)
        self._rows = {name: _row(name, shapes[name], layout) for name in names if name in shapes}
        assert len(self._rows) == len(shapes), "a parameter is missing from the order"

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def parts(self) -> dict[str, tuple[Row, tuple[int, ...], torch.dtype | None]]:
        """Every stored tensor by name: the row it belongs to, and its shape and dtype as in `Row.parts`."""
        return {name: (row, *part) for row in self.values() for name, part in row.parts().items()}


def _row(name: str, shape: tuple[int, ...], layout: Layout) -> Row:
    experts, matrix = (shape[0], shape[1:]) if len(shape) == 3 else (None, shape)
    format = layout.format_of(name, *matrix) if name.endswith(_PACKABLE) else None
    return Row(name, matrix, experts, format)
