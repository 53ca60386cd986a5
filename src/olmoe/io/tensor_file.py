"""safetensors files, written part by part and read through a memory map.

The format: 8 bytes with the little-endian length of a JSON header, the header (name -> dtype, shape, data_offsets
relative to its end), then the data without gaps (format description: github.com/huggingface/safetensors). The library
of that name writes tensors that are all in memory, at whatever offsets they happen to have. Here the header is padded
with spaces until the data starts at a multiple of 64 bytes, the caller orders the tensors, and values are written at
any time, in parts of any size.

Files come from anywhere, so the reader trusts nothing: every size, offset and name is checked against the others
and against the file before anything is mapped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from olmoe.errors import CheckpointError, shown
from olmoe.io.foreign import check_contents, other_weights
from olmoe.io.json_file import read_object

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
ALIGNMENT = 64
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its range of bytes in the file, its dtype as safetensors names it, and its shape."""

    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


class TensorFile:
    """The tensors of a file as views of its memory map: no value is read before it is used, and none is copied.

    Raises `CheckpointError` with one sentence for a file that is missing, truncated, or inconsistent. Pages are shared
    between processes; writing to a view copies the page for this process and leaves the file alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.entries, self.metadata = read_header(file, path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._ask_for_large_pages()
        except FileNotFoundError:
            raise CheckpointError(f"There is no file {path}; check that the checkpoint folder is complete.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file.") from None

    def _ask_for_large_pages(self) -> None:
        """Ask for pages of 2 MB for what is read from disk: weights are then read a tenth faster.

        The page size in the system's cache is decided when a file is first read. Some systems refuse.
        docs/journal/2026-11-25-pages-of-2-mb.md has the measurement.
        """
        with contextlib.suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_HUGEPAGE)

    def tensor(self, name: str) -> Tensor:
        """A view of one tensor; a copy only if the file, written by others, starts it at an unaligned byte."""
        entry = self.entries[name]
        dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % 4:  # kernels and bit casts need words of 4 bytes
            raw = bytearray(self._map[entry.start : entry.end])
            return torch.frombuffer(raw, dtype=dtype).view(entry.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


class TensorFiles:
    """The tensors of a checkpoint folder, in one file or in shards with an index, as `TensorFile` gives them.

    `path` is the file, or the folder of several.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX_NAME
        if (folder / SINGLE_NAME).is_file() or not index.is_file():  # one file comes first, as in transformers
            self.path = folder / SINGLE_NAME
            if not self.path.is_file() and (hint := other_weights(folder)):
                raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}.")
            files, promised = [TensorFile(self.path)], set[str]()
        else:
            self.path = folder
            weight_map = read_index(index)
            promised = set(weight_map)
            files = [TensorFile(folder / name) for name in sorted(set(weight_map.values()))]
        self.num_bytes = sum(file.path.stat().st_size for file in files)
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for file in files:
            for name, entry in file.entries.items():
                if name in self.entries:
                    other = self._places[name][0].path.name
                    raise CheckpointError(f"Tensor {shown(name)} is in both {other} and {file.path.name}.")
                self.entries[name], self._places[name] = entry, (file, name)
        if missing := sorted(promised - set(self.entries)):
            raise CheckpointError(f"{index} lists {shown(missing[0])}, which the shards do not hold.")

    def tensor(self, name: str) -> Tensor:
        """A view of one tensor; see `TensorFile.tensor`."""
        file, stored_name = self._places[name]
        return file.tensor(stored_name)

    def rename(self, old: str, new: str) -> None:
        """Give tensors whose name starts with `old` a name that starts with `new`."""
        for name in [name for name in self.entries if name.startswith(old)]:
            renamed = new + name.removeprefix(old)
            self.entries[renamed], self._places[renamed] = self.entries.pop(name), self._places.pop(name)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index of shards. It can only name files in the same folder."""
    try:
        weight_map = read_object(path).get("weight_map")
    except CheckpointError:
        raise
    except TypeError:
        weight_map = None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again.") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor to file; fetch it again.")
    for file in weight_map.values():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise CheckpointError(
                f"{path} names the shard {shown(file)}, which is not a file of its own folder; refused."
            )
    return weight_map


def read_header(file: Any, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name and the metadata of an open file. Raises `CheckpointError` unless everything agrees."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
        check_contents(path, "safetensors file")
        raise CheckpointError(f"{path} is truncated or not a safetensors file; fetch or write it again.")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The header of {path} is damaged ({error}); fetch or write the file again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of {path} is not a JSON object; fetch or write the file again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"The metadata of {path} are not texts by name; fetch or write the file again.")
    entries = {name: _entry(path, name, raw, 8 + length, size) for name, raw in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise CheckpointError(
                f"Tensor {shown(name)} of {path} does not start where the one before it ends; fetch or write the file "
                "again."
            )
        position = entry.end
    if position != size:
        raise CheckpointError(
            f"{path} has {size} bytes, but its header describes {position}; fetch or write the file again."
        )
    return entries, metadata


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(path: Path, name: str, raw: Any, data_start: int, size: int) -> Entry:
    """One entry of the header, checked against itself and against the size of the file."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"Tensor {shown(name)} of {path} is not described as in safetensors; refused.")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"Tensor {shown(name)} of {path} is stored as {shown(dtype)}; only {', '.join(DTYPES)} can be loaded."
        )
    if not _integers(shape) or len(shape) > 8:
        raise CheckpointError(f"Tensor {shown(name)} of {path} has the impossible shape {shown(shape)}; refused.")
    if not _integers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data_start:
        raise CheckpointError(f"Tensor {shown(name)} of {path} lies at {shown(offsets)}, outside the file; refused.")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"Tensor {shown(name)} of {path} has shape {shown(shape)} as {dtype}, but {offsets[1] - offsets[0]} bytes; "
            "refused."
        )
    return Entry(data_start + offsets[0], data_start + offsets[1], dtype, tuple(shape))


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


class TensorWriter:
    """Writes a file whose tensors are declared first and filled in any order, as a context manager.

    The whole file is reserved at once, so that a disk without room for it fails before hours of work. Leaving the
    block without an exception checks that every byte was written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._starts: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
        position = 0
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
            self._starts[name], self._left[name] = position, size
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.size = 8 + len(text) + position
        self._starts = {name: 8 + len(text) + start for name, start in self._starts.items()}
        self._file = path.open("wb")
        try:
            _reserve(self._file.fileno(), self.size)
            self._file.write(len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, part: Tensor, offset: int = 0) -> None:
        """Write a contiguous part of the tensor `name`, `offset` bytes after its start."""
        assert part.dtype == self._dtypes[name], f"{name} is declared as {self._dtypes[name]}, not {part.dtype}"
        raw = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        assert raw.nbytes <= self._left[name], f"more bytes than {name} has"
        self._file.seek(self._starts[name] + offset)
        self._file.write(raw.data)
        self._left[name] -= raw.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # otherwise the first error is the one to report
                raise
        if error is None:
            missing = [name for name, left in self._left.items() if left]
            assert not missing, f"tensors without all their values: {missing}"


def _reserve(descriptor: int, size: int) -> None:
    """Allocate a file's blocks, or at least set its size where the file system cannot."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)
