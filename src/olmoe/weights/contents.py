"""What the files of a checkpoint hold: bytes by parameter; for packed ones, formats and weights by kind of tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from olmoe.io.tensor_file import DTYPES
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.hf_folder import FLOAT_DTYPES, HFFolder
from olmoe.weights.names import EMBEDDING, EXPERTS
from olmoe.weights.packed_file import PackedFile, Tensors
from olmoe.weights.table import TensorTable


@dataclass(frozen=True)
class Packed:
    """What was written: bytes and weights by kind of tensor, and the size of the file."""

    kinds: dict[str, tuple[str, int, int]]  # kind -> its formats, its weights, its bytes
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file per weight, header included."""
        return 8 * self.file_bytes / sum(weights for _, weights, _ in self.kinds.values())

    @property
    def formats(self) -> list[str]:
        """The names of all formats that occur."""
        return sorted({name for formats, _, _ in self.kinds.values() for name in formats.split()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Format, weights and bytes by kind of tensor, for JSON."""
        return {k: {"format": f, "weights": w, "bytes": b} for k, (f, w, b) in self.kinds.items()}

    def table(self) -> str:
        """Kinds of tensors with their formats, weights, bytes and bits per weight, as a Markdown table."""
        lines = ["| tensors | format | weights | bytes | bits per weight |", "| --- | --- | ---: | ---: | ---: |"]
        for kind, (formats, weights, size) in self.kinds.items():
            lines.append(f"| {kind} | {formats} | {weights:,} | {size:,} | {8 * size / weights:.2f} |")
        weights = sum(weights for _, weights, _ in self.kinds.values())
        lines.append(f"| file | | {weights:,} | {self.file_bytes:,} | {self.bits_per_weight:.2f} |")
        return "\n".join(lines)


def describe(table: TensorTable, tensors: Tensors, file_bytes: int) -> Packed:
    """What a packed file of the `tensors` of a table holds, by kind."""
    kinds: dict[str, tuple[set[str], int, int]] = {}
    for name, (row, _, _) in table.parts().items():
        (shape, dtype) = tensors[name]
        format = str(dtype).removeprefix("torch.") if row.format is None else row.format.name
        weights = row.weights if name == row.name else 0  # its other tensors hold no weights of their own
        formats, others, size = kinds.get(_kind(name), (set(), 0, 0))
        kinds[_kind(name)] = formats | {format}, others + weights, size + math.prod(shape) * dtype.itemsize
    return Packed({k: (" ".join(sorted(f)), w, b) for k, (f, w, b) in kinds.items()}, file_bytes)


def contents_of(checkpoint: Checkpoint) -> Packed:
    """What a packed checkpoint holds, from its headers alone. Raises what loading it would."""
    source = checkpoint.source()
    assert isinstance(source, PackedFile), f"{checkpoint.folder} is not packed"
    tensors = {name: (entry.shape, DTYPES[entry.dtype]) for name, entry in source.tensors.entries.items()}
    return describe(source.table, tensors, source.num_bytes)


def parameter_bytes(source: HFFolder | PackedFile) -> dict[str, int]:
    """How many bytes each parameter of a checkpoint takes on disk, from its headers alone."""
    found: dict[str, int] = {}
    if isinstance(source, PackedFile):
        for name, (row, _, _) in source.table.parts().items():
            entry = source.tensors.entries[name]
            found[row.name] = found.get(row.name, 0) + entry.end - entry.start
        return found
    for name, part in source.parts.items():
        size = math.prod(part.shape) * FLOAT_DTYPES[source.stored[name].dtype].itemsize
        found[part.parameter] = found.get(part.parameter, 0) + size
    return found


def bytes_a_token(source: HFFolder | PackedFile, top_k: int | None = None) -> int:
    """The bytes of weights that one token reads.

    These are `top_k` experts per layer (by default the model's number) and all other weights except the embeddings, of
    which a token needs only one row.
    """
    config, total = source.config, 0
    top_k = config.num_experts_per_tok if top_k is None else top_k
    for name, size in parameter_bytes(source).items():
        if f".{EXPERTS}." in name:
            total += size * top_k // config.num_experts
        elif name != EMBEDDING or config.tie_word_embeddings:
            total += size
    return total


def _kind(name: str) -> str:
    """The row of the table that a parameter belongs to."""
    for mark, kind in (
        ("embed_tokens", "embeddings"),
        ("lm_head", "output head"),
        ("_proj.weight", "attention"),
        ("gate_up_proj", "experts, gate and up"),
        ("down_proj", "experts, down"),
        ("mlp.gate", "routers"),
    ):
        if mark in name:
            return kind
    return "norms and biases"
