"""Writing GGUF files (version 3), tensor by tensor: the header is fixed first, then the data streams after it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from olmoe.io.atomic import atomic_file
from olmoe.weights.gguf.block_types import BlockType, Bytes
from olmoe.weights.gguf.reader import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING, Value

VERSION = 3
UINT32, INT32, FLOAT32 = 4, 5, 6
_NUMBER_OF_DTYPE = {np.dtype(dtype): kind for kind, dtype in NUMBERS.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written: its name in the file, row-major shape and block type."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


def write(
    target: str | Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedTensor],
    data: Iterable[Bytes],
) -> None:
    """Write `target` atomically. `data` yields the bytes of all `tensors` in order, in parts of any size that do
    not cross from one tensor to the next; only one part is held at a time.

    Integers of the metadata are written as 32-bit (unsigned unless negative), floats as fp32, numpy arrays in their
    own dtype. Raises `UserError` if the disk is full or the file cannot be written.
    """
    with atomic_file(target) as temporary, temporary.open("wb") as file:
        file.write(header(metadata, tensors))
        parts = iter(data)
        for tensor in tensors:
            _pad(file)
            left = tensor.num_bytes
            while left:
                part = next(parts)
                left -= part.nbytes
                assert left >= 0, f"{tensor.name}: more bytes than planned"
                file.write(np.ascontiguousarray(part).data)
        _pad(file)
        assert next(parts, None) is None, "more data than planned"


def header(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> bytes:
    """The bytes before the tensors' data, not yet padded to the alignment."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]  # GGUF names the contiguous dimension first
        parts += [
            _text(tensor.name),
            struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind.code, offset),
        ]
        offset += -(-tensor.num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return b"".join(parts)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    """The type number and the bytes of a metadata value."""
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<Ii", INT32, value) if value < 0 else struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    kind = BOOL if value.dtype == np.bool_ else _NUMBER_OF_DTYPE[value.dtype.newbyteorder("<")]
    return struct.pack("<IIQ", ARRAY, kind, value.size) + value.astype(value.dtype.newbyteorder("<")).tobytes()
