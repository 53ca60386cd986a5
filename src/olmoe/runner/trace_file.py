"""Traces: which experts every token of a text chose, in one file that grows during recording and is memory-mapped.

A trace is a safetensors file, so that whatever reads these reads traces: `expert_ids` (N, L, K) by falling probability,
`weights` (N, L, K) fp16, `input_ids` (N,), `predicted_ids` (N,) if requested, and `starts`, the first token of each
window that the model read. Its metadata hold the version of this schema, and a description of the model.

Shapes legend: N tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from olmoe.config import ModelConfig
from olmoe.errors import UserError
from olmoe.io import targets
from olmoe.io.atomic import atomic_file, clear_os_errors
from olmoe.io.mapped import forget

SCHEMA = "olmoe-trace-1"
_DTYPES = {"U8": "<u1", "U16": "<u2", "F16": "<f2", "I32": "<i4", "I64": "<i8"}
_COPY_BYTES = 1 << 24
# Tokens that are reordered at a time.
_PART = 1 << 14


@dataclass(frozen=True)
class Trace:
    """A trace in memory, or mapped from its file. If a token chose fewer experts, `expert_ids` has its largest value.

    `predicted_ids` are the model's likeliest next tokens, if they were recorded.
    """

    expert_ids: npt.NDArray[np.integer[Any]]
    weights: npt.NDArray[np.float16]
    input_ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    predicted_ids: npt.NDArray[np.int32] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """The number of experts per layer."""
        return int(self.metadata["experts"])

    def __len__(self) -> int:
        return len(self.input_ids)

    def windows(self) -> Iterator[slice]:
        """Which tokens the model read together: those of part of a document, of a request, or of a row of a batch."""
        for start, end in itertools.pairwise([*self.starts.tolist(), len(self)]):
            yield slice(start, end)

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Map a trace: nothing is read before it is used. Raises `UserError` if the file is not a trace."""
        path = Path(os.path.expanduser(path))
        try:
            with path.open("rb") as file:
                header, start = _read_header(file, os.path.getsize(path))
            return cls._of(header, lambda entry: _mapped(path, entry, start))
        except OSError as error:
            raise UserError(f"The trace {path} cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a trace of olmoe ({error}); make one with olmoe analyze.") from None

    @classmethod
    def _of(cls, header: dict[str, Any], array_of: Callable[[Mapping[str, Any]], npt.NDArray[Any]]) -> Trace:
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != SCHEMA:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {SCHEMA!r}")
        arrays = {name: array_of(entry) for name, entry in header.items()}
        return cls(
            arrays["expert_ids"],
            arrays["weights"],
            arrays["input_ids"],
            np.asarray(arrays["starts"]),
            arrays.get("predicted_ids"),
            metadata,
        )


class TraceWriter:
    """Writes a trace part by part; the file appears when the `with` block has ended well, and `trace` opens it.

    It takes the memory of one part. With a `path` of None the whole trace stays in memory, as compact as in the file.
    `predictions` says whether predicted ids will be given.

    Parts come window by window, each announced by `start`; or parts of several windows alternate, as for requests that
    are computed together, and name the window they continue. In the file, windows follow one another in any case.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        layers: int,
        experts: int,
        top_k: int,
        predictions: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Raises `UserError` for a `path` where no file can be written."""
        self._path = None if path is None else Path(os.path.expanduser(path))
        if self._path is not None:
            targets.check_file(self._path, overwrite=True)
            targets.check_place(self._path)
        self.layers, self.top_k, self.predictions = layers, top_k, predictions
        self.id_dtype = np.dtype("<u1" if experts < 2**8 else "<u2")  # the largest value means no expert
        self.tokens = 0
        self._metadata = {"format": SCHEMA, "experts": str(experts)} | dict(metadata or {})
        self._dtypes = {"expert_ids": self.id_dtype, "weights": np.dtype("<f2"), "input_ids": np.dtype("<i4")}
        if predictions:
            self._dtypes["predicted_ids"] = np.dtype("<i4")
        self._files: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()
        # What was written, in order: (window, number of tokens); -1 is before the first.
        self._windows, self._counts = array("q"), array("q")
        self._window = -1
        self._written = False
        self._trace: Trace | None = None

    @classmethod
    def of(cls, config: ModelConfig, path: str | Path | None, *, top_k: int | None = None, **options: Any) -> Self:
        """A writer for a model; a token has at most `top_k` experts, by default the model's number."""
        return cls(
            path,
            layers=config.num_hidden_layers,
            experts=config.num_experts,
            top_k=top_k or config.num_experts_per_tok,
            **options,
        )

    def __enter__(self) -> Self:
        if self._path is None:
            self._files = {name: io.BytesIO() for name in self._dtypes}
            return self
        with clear_os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for name in self._dtypes:
                self._files[name] = self._stack.enter_context(tempfile.TemporaryFile(dir=self._path.parent))
        return self

    def start(self) -> int:
        """Start a window with the next tokens; returns its number, by which `append` can return to it."""
        self._window += 1
        return self._window

    def append(
        self,
        expert_ids: npt.NDArray[np.integer[Any]],
        weights: npt.NDArray[np.floating[Any]],
        input_ids: Sequence[int] | npt.NDArray[np.integer[Any]],
        predicted_ids: Sequence[int] | npt.NDArray[np.integer[Any]] = (),
        *,
        window: int | None = None,
    ) -> None:
        """Add tokens: what they chose (n, L, k), -1 for no expert, and the ids read and predicted (n,).

        They continue `window`, by default the one that was started last.
        """
        count = len(input_ids)
        assert len(expert_ids) == len(weights) == count
        assert expert_ids.shape[1] == weights.shape[1] == self.layers, (expert_ids.shape, self.layers)
        given = {
            "expert_ids": _of_width(expert_ids, self.top_k, -1),
            "weights": _of_width(weights, self.top_k, 0),
            "input_ids": input_ids,
            "predicted_ids": predicted_ids,
        }
        with clear_os_errors(self._path or Path()):
            for name, file in self._files.items():
                assert len(given[name]) == count
                file.write(np.ascontiguousarray(given[name], dtype=self._dtypes[name]).tobytes())
        self.tokens += count
        window = self._window if window is None else window
        if self._windows and self._windows[-1] == window:
            self._counts[-1] += count
        elif count:
            self._windows.append(window)
            self._counts.append(count)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                self._finish()
                self._written = True
        self._files = {}

    @property
    def trace(self) -> Trace:
        """What was written, once the `with` block has ended without an error. Raises `UserError` if it has not."""
        if not self._written:
            raise UserError("The trace is not written yet, or its block has failed; read it after the with block.")
        if self._trace is None:
            assert self._path is not None
            self._trace = Trace.open(self._path)
        return self._trace

    def _finish(self) -> None:
        if self._path is None:
            whole = io.BytesIO()
            self._write(whole)
            size = whole.tell()
            whole.seek(0)
            header, start = _read_header(whole, size)
            data = whole.getbuffer()
            self._trace = Trace._of(header, lambda entry: _viewed(data, entry, start))
            return
        with atomic_file(self._path) as target, open(target, "wb") as out:
            self._write(out)

    def _write(self, out: IO[bytes]) -> None:
        names = {np.dtype(code): name for name, code in _DTYPES.items()}
        shapes = dict.fromkeys(self._dtypes, (self.tokens,)) | dict.fromkeys(
            ("expert_ids", "weights"), (self.tokens, self.layers, self.top_k)
        )
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        starts, order = self._order()
        for name, shape in [("starts", starts.shape), *shapes.items()]:
            dtype = starts.dtype if name == "starts" else self._dtypes[name]
            end = at + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 64)
        out.write(len(text).to_bytes(8, "little") + text + starts.tobytes())
        for file in self._files.values():
            if order is None:
                file.seek(0)
                shutil.copyfileobj(file, out, _COPY_BYTES)
            else:
                self._copy_in_order(file, out, order)

    def _order(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
        """The first token of each window, and the order of what was written, or None if it is already in order."""
        windows, counts = np.array(self._windows, dtype="<i8"), np.array(self._counts, dtype="<i8")
        order = np.argsort(windows, kind="stable")
        firsts = np.cumsum(counts[order]) - counts[order]
        numbers, at = np.unique(windows[order], return_index=True)
        in_order = bool((order[1:] > order[:-1]).all())
        return firsts[at][numbers >= 0], None if in_order else order

    def _copy_in_order(self, file: IO[bytes], out: IO[bytes], order: npt.NDArray[np.int64]) -> None:
        """Copy a file's tokens in this order, a few at a time to save memory."""
        counts = np.array(self._counts, dtype="<i8")
        firsts, ends = np.cumsum(counts) - counts, np.cumsum(counts[order])
        file.flush()
        rows = _rows_of(file, self.tokens)
        at = done = 0
        while at < len(order):
            stop = max(at + 1, int(np.searchsorted(ends, done + _PART, side="right")))
            part = order[at:stop]
            sizes = counts[part]
            tokens = np.repeat(firsts[part] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
            out.write(rows[tokens].tobytes())
            forget(rows)
            at, done = stop, int(ends[stop - 1])


def _of_width(values: npt.NDArray[Any], k: int, none: int) -> npt.NDArray[Any]:
    """Values (n, L, any) as (n, L, k): a policy may choose fewer or more experts, in some rows of a batch only."""
    missing = k - values.shape[2]
    if missing == 0:
        return values
    if missing > 0:
        return np.pad(values, ((0, 0), (0, 0), (0, missing)), constant_values=none)
    if (values[:, :, k:] != none).any():
        raise UserError(f"A token chose {values.shape[2]} experts, but the trace has room for {k}; give it a top_k.")
    return values[:, :, :k]


def _rows_of(file: IO[bytes], tokens: int) -> npt.NDArray[np.uint8]:
    """The bytes of each token, (N, bytes)."""
    if isinstance(file, io.BytesIO):
        return np.frombuffer(file.getvalue(), dtype=np.uint8).reshape(tokens, -1)
    size = os.fstat(file.fileno()).st_size
    return np.memmap(file, dtype=np.uint8, mode="r", shape=(tokens, size // tokens))


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the data start."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(1 << 20, size):
        raise ValueError("it has no header of a safetensors file")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header, 8 + length


def _place(entry: Mapping[str, Any], data: int, size: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Dtype, shape and first byte of an array. Raises `ValueError` unless it fits into a file of that size."""
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
    start, end = entry["data_offsets"]
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if min(shape, default=0) < 0 or end - start != needed or data + end > size:
        raise ValueError("its header and its data differ in size; it is cut off or damaged")
    return dtype, shape, data + start


def _mapped(path: Path, entry: Mapping[str, Any], data: int) -> npt.NDArray[Any]:
    dtype, shape, start = _place(entry, data, os.path.getsize(path))
    if 0 in shape:
        return np.zeros(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _viewed(whole: memoryview, entry: Mapping[str, Any], data: int) -> npt.NDArray[Any]:
    dtype, shape, start = _place(entry, data, len(whole))
    return np.frombuffer(whole, dtype=dtype, count=int(np.prod(shape)), offset=start).reshape(shape)
