"""Reading GGUF files (versions 2 and 3): metadata and the location of each tensor, checked before anything is used.

A file is a header (magic, version, counts), key-value metadata, tensor descriptions, and the tensors' bytes, each
at a multiple of the alignment (`ggml/docs/gguf.md`). The file is memory-mapped: tensors are views, nothing is
copied. Every count, length, shape and offset is compared with the size of the file before memory is allocated for
it, so whatever the bytes are, opening a file costs time and memory in proportion to its header.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmoe.errors import CheckpointError, shown
from olmoe.io.foreign import check_contents
from olmoe.weights.gguf.block_types import OTHER_TYPES, TYPES, BlockType, Bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Bounds far above what any model needs, so that a hostile header cannot keep a reader busy.
MAX_ALIGNMENT = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 16
MAX_STRINGS = 1 << 22  # in one array
MAX_NAME_BYTES = 1 << 16
MAX_DIMENSIONS = 4

Scalar = bool | int | float | str
Value = Scalar | list[str] | NDArray[Any]

# Value types of the metadata: number in the file -> little-endian numpy dtype.
NUMBERS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor. `shape` is row-major, the last dimension contiguous (GGUF stores the reverse)."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    start: int  # in the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, along the last dimension."""
        return self.kind.row_bytes(self.shape[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """An open GGUF file: `metadata` and `tensors` by name, and the tensors' bytes as views of the mapped file."""

    def __init__(self, path: str | Path) -> None:
        """Map `path` and read its header. Raises `CheckpointError` with one sentence for whatever is wrong."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0  # an empty file cannot be mapped
                self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"There is no file {self.path}; check the path.") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{self.path} cannot be read ({reason}); check the path and its permissions."
            ) from None
        if self._map is not None and self._map[:4] != MAGIC:
            check_contents(self.path, "GGUF file")
        self._open(np.frombuffer(self._map or b"", np.uint8))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "file.gguf") -> GGUFFile:
        """The same from bytes in memory; `name` appears in error messages."""
        file = cls.__new__(cls)
        file.path, file._map = Path(name), None
        file._open(np.frombuffer(data, np.uint8))
        return file

    def _open(self, data: Bytes) -> None:
        self._data = data
        header = _Header(data, self.path.name)
        self.version, self.alignment = header.version, header.alignment
        self.metadata: dict[str, Value] = header.metadata
        self.tensors: dict[str, TensorInfo] = header.tensors

    def release(self) -> None:
        """Release the pages that were read, which then no longer count as this process's memory."""
        if self._map is not None:
            with contextlib.suppress(OSError, AttributeError):  # some systems refuse or have no such call
                self._map.madvise(mmap.MADV_DONTNEED)

    def rows(self, name: str, *index: int) -> Bytes:
        """A view of the bytes of a tensor, or of its part at the leading indices `index`: (..., bytes of a row)."""
        tensor = self.tensors[name]
        values = self._data[tensor.start : tensor.start + tensor.num_bytes]
        view = values.reshape(*tensor.shape[:-1], tensor.row_bytes)
        return np.asarray(view[index] if index else view)


class _Header:
    """One pass over the header, with a position that never leaves the file."""

    def __init__(self, data: Bytes, name: str) -> None:
        self.name, self.data, self.size, self.at = name, data.data, len(data), 0
        magic = bytes(self.data[:4])
        if magic != MAGIC:
            raise CheckpointError(f"{name} is not a GGUF file (it starts with {shown(magic)}, not {shown(MAGIC)}).")
        self.at = 4
        self.version = self._version()
        tensor_count, key_count = self.number("<u8"), self.number("<u8")
        # The smallest description of a tensor takes 33 bytes, the smallest key with a value 14.
        self.check_count("tensors", tensor_count, 33, MAX_TENSORS)
        self.check_count("metadata keys", key_count, 14, MAX_KEYS)
        self.metadata = self._metadata(key_count)
        self.alignment = self._alignment()
        described = [self._tensor() for _ in range(tensor_count)]
        self.tensors = self._placed(described)

    # ---- bytes ----

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self.at + count
        if end > self.size:
            raise CheckpointError(f"{self.name} ends within its header (at byte {self.size}); fetch it again.")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, dtype: str) -> int:
        """The next unsigned integer of that numpy dtype."""
        size = int(dtype[2])
        return int.from_bytes(self.take(size), "little")

    def text(self, what: str, limit: int | None = None) -> str:
        """The next string: a 64-bit length and UTF-8."""
        length = self.number("<u8")
        if length > self.size - self.at or (limit is not None and length > limit):
            raise CheckpointError(f"{self.name} gives {what} a length of {length} bytes; the file is damaged.")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.name} holds {what} that is not UTF-8; the file is damaged.") from None

    def check_count(self, what: str, count: int, least_bytes: int, limit: int) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        if count > limit or count * least_bytes > self.size - self.at:
            raise CheckpointError(
                f"{self.name} announces {count} {what}, more than the {self.size} bytes of the file can hold or any "
                "model needs; it is truncated or damaged."
            )

    # ---- parts of the header ----

    def _version(self) -> int:
        version = self.number("<u4")
        if version in VERSIONS:
            return version
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise CheckpointError(f"{self.name} is a big-endian GGUF file; only little-endian ones can be read.")
        raise CheckpointError(f"{self.name} is GGUF version {version}; only versions 2 and 3 can be read.")

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self.text("a metadata key", MAX_NAME_BYTES)
            if key in metadata:
                raise CheckpointError(f"{self.name} holds the metadata key {shown(key)} twice; the file is damaged.")
            metadata[key] = self._value(key, self.number("<u4"))
        return metadata

    def _value(self, key: str, kind: int) -> Value:
        if kind == STRING:
            return self.text(f"the value of {shown(key)}")
        if kind == BOOL:
            return self._bool(key, self.take(1)[0])
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            number: int | float = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
            return number
        if kind == ARRAY:
            return self._array(key)
        raise CheckpointError(f"{self.name} gives {shown(key)} the unknown value type {kind}; the file is damaged.")

    def _bool(self, key: str, byte: int) -> bool:
        if byte > 1:
            raise CheckpointError(f"{self.name} gives {shown(key)} the truth value {byte}; the file is damaged.")
        return byte == 1

    def _array(self, key: str) -> Value:
        kind, count = self.number("<u4"), self.number("<u8")
        what = f"values for {shown(key)}"
        if kind == STRING:
            self.check_count(what, count, 8, MAX_STRINGS)
            return [self.text(f"a value of {shown(key)}") for _ in range(count)]
        if kind == ARRAY:
            raise CheckpointError(f"{self.name} nests arrays in {shown(key)}, which no model needs; it is refused.")
        if kind != BOOL and kind not in NUMBERS:
            raise CheckpointError(f"{self.name} gives {shown(key)} values of the unknown type {kind}; it is damaged.")
        dtype = np.dtype("u1" if kind == BOOL else NUMBERS[kind])
        self.check_count(what, count, dtype.itemsize, self.size)
        array = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == BOOL:
            self._bool(key, int(array.max(initial=0)))
            return array.astype(np.bool_)
        return array

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or isinstance(alignment, bool)
            or not 8 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise CheckpointError(
                f"{self.name} has general.alignment {shown(alignment)}, which must be a power of two from 8 to "
                f"{MAX_ALIGNMENT}."
            )
        return alignment

    def _tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self.text("a tensor name", MAX_NAME_BYTES)
        dimensions = self.number("<u4")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{self.name} gives tensor {shown(name)} {dimensions} dimensions; it is damaged.")
        sizes = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        code, offset = self.number("<u4"), self.number("<u8")
        kind = TYPES.get(code)
        if kind is None:
            raise CheckpointError(
                f"{self.name} stores tensor {shown(name)} as {OTHER_TYPES.get(code, f'the unknown type {code}')}; "
                f"only {', '.join(k.name for k in TYPES.values())} can be read."
            )
        if min(sizes) < 1 or math.prod(sizes) >= 1 << 60:
            raise CheckpointError(f"{self.name} gives tensor {shown(name)} the impossible shape {shown(sizes[::-1])}.")
        if sizes[0] % kind.block_values:
            raise CheckpointError(
                f"{self.name} gives tensor {shown(name)} rows of {sizes[0]} values, which are not whole blocks of "
                f"{kind.block_values} as {kind.name} needs."
            )
        return name, sizes[::-1], kind, offset

    def _placed(self, described: list[tuple[str, tuple[int, ...], BlockType, int]]) -> dict[str, TensorInfo]:
        """The tensors in the data section, which starts at the next multiple of the alignment."""
        begin = -(-self.at // self.alignment) * self.alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in described:
            if name in tensors:
                raise CheckpointError(f"{self.name} holds tensor {shown(name)} twice; the file is damaged.")
            if offset % self.alignment:
                raise CheckpointError(
                    f"{self.name} puts tensor {shown(name)} at offset {offset}, not a multiple of the alignment "
                    f"{self.alignment}."
                )
            tensor = TensorInfo(name, shape, kind, begin + offset)
            if tensor.start + tensor.num_bytes > self.size:
                raise CheckpointError(
                    f"{self.name} ends before its tensor {shown(name)} does (byte {tensor.start + tensor.num_bytes} of "
                    f"{self.size}); it is truncated, so fetch it again."
                )
            tensors[name] = tensor
        previous: TensorInfo | None = None
        for tensor in sorted(tensors.values(), key=lambda t: t.start):
            if previous is not None and tensor.start < previous.start + previous.num_bytes:
                raise CheckpointError(
                    f"{self.name} lets tensors {shown(previous.name)} and {shown(tensor.name)} overlap; it is damaged."
                )
            previous = tensor
        return tensors
