"""Token files from other programs: the layout of their bytes, as far as it can be determined without guessing.

`dolma tokens` and OLMo-core write raw little-endian ids without a header, uint16 or uint32 by the size of the
vocabulary; `numpy.save` writes a header that says it all.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from olmoe.errors import ConfigError, shown

NUMPY_MAGIC = b"\x93NUMPY"
WIDTHS = ("uint16", "uint32", "uint64", "int32", "int64", "uint8", "int16")
_LOOKED_AT = 2**20  # ids at the beginning that tell a width


@dataclass(frozen=True)
class Layout:
    """How ids lie in a file: numpy's name of their type, the bytes before them, and their number."""

    dtype: str
    offset: int
    count: int


def read_layout(path: Path, dtype: str | None = None) -> Layout:
    """The layout of a token file; `dtype` is what its owner says of one without a header.

    Raises `ConfigError` if it cannot be a token file, or if it is not of the type that is said or assumed.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        if handle.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            return _from_header(path, dtype)
    kind = _named(dtype, path) if dtype is not None else np.dtype("<u2")
    width = kind.itemsize
    if size % width or size < 2 * width:
        ids = "ids of 1 byte" if width == 1 else f"ids of {width} bytes"
        raise ConfigError(f"The token file {path} has {size} bytes, which is not two or more {ids} each.")
    if dtype is None:
        _refuse_other_widths(path)
    else:
        _refuse_half_empty(path, kind)
    return Layout(kind.str, 0, size // width)


def map_ids(path: str | Path, layout: Layout) -> npt.NDArray[Any]:
    """The ids of a file, mapped into memory, read-only. Each stays an open file, of which a system allows so many."""
    try:
        return np.memmap(path, dtype=layout.dtype, mode="r", offset=layout.offset, shape=(layout.count,))
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise ConfigError(
            f"The token file {path} cannot be opened in addition to the others, because the system allows no more open "
            "files; raise that limit (ulimit -n), or join files."
        ) from None


def _named(dtype: str, path: Path) -> np.dtype[Any]:
    """The type that a configuration names; little-endian unless it says otherwise."""
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(bool)
    if kind.kind not in "iu":
        raise ConfigError(f"The dtype of {path} must be one of {', '.join(WIDTHS)}, not {shown(dtype)}.")
    return kind if dtype.startswith((">", "<", "=", "|")) else kind.newbyteorder("<")


def _from_header(path: Path, dtype: str | None) -> Layout:
    """The layout that `numpy.save` wrote down."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path} starts like a file of numpy.save, but cannot be read ({error}).") from None
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{path} was written by numpy.save with the type {array.dtype}, but token ids are integers.")
    if dtype is not None and _named(dtype, path).newbyteorder("<") != array.dtype.newbyteorder("<"):
        raise ConfigError(f"{path} declares its ids as {array.dtype}, not {dtype}; leave its dtype out.")
    if array.ndim > 1 and not array.flags.c_contiguous:
        raise ConfigError(f"{path} holds a matrix by columns; save it with numpy.ascontiguousarray.")
    if array.size < 2:
        raise ConfigError(f"The token file {path} holds {array.size} ids, but training needs two or more.")
    return Layout(array.dtype.str, array.offset, array.size)


def _refuse_half_empty(path: Path, kind: np.dtype[Any]) -> None:
    """Refuse a declared type if every second id is exactly 0: the upper half of a wider one."""
    ids = np.fromfile(path, dtype=kind, count=_LOOKED_AT)
    pairs = ids[: len(ids) // 2 * 2].reshape(-1, 2)
    varied = [len(np.unique(pairs[:, i])) for i in (0, 1)]
    if min(varied) == 1 and max(varied) >= 8 and not pairs[:, int(varied[1] == 1)].any():
        wider = f"{kind.kind}{2 * kind.itemsize}"
        raise ConfigError(
            f"The token file {path} does not hold {kind} ids: every second one would be 0, as if wider ids were read "
            f'so; set dtype = "{np.dtype(wider)}" (or what it is) beside its path.'
        )


def _refuse_other_widths(path: Path) -> None:
    """Refuse raw ids that are not uint16: read as such, every second one (or three of four) would be 0 or hardly more.

    The upper halves of ids up to half a million take at most 8 values, as every second token of no text does.
    """
    ids = np.fromfile(path, dtype="<u2", count=_LOOKED_AT)
    pairs = ids[: len(ids) // 2 * 2].reshape(-1, 2)
    pairs = pairs[pairs.any(axis=1)]
    if len(pairs) < 4:
        return
    low, high = (pairs != 0).mean(axis=0)
    distinct = [len(np.unique(pairs[:, i])) for i in (0, 1)]
    if min(low, high) > 0.05 and not (min(distinct) <= 8 and max(distinct) >= 32):
        return
    quads = ids[: len(ids) // 4 * 4].reshape(-1, 4)
    wide = bool(quads[:, 0].any()) and not quads[:, 1:].any()
    likely = "int64" if wide else ("uint32" if (high, distinct[1]) < (low, distinct[0]) else ">u4")
    raise ConfigError(
        f"The token file {path} does not hold uint16 ids: every second one would be next to 0, as where wider ids are "
        f'read so; set dtype = "{likely}" (or what it is) beside its path.'
    )
