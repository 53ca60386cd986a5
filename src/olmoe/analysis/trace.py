"""Traces: which experts every token of a text chose, in one file that grows as it is recorded and is read by mapping.

A trace is a safetensors file, so that whatever reads these reads traces: `expert_ids` (N, L, K) by falling probability,
`weights` (N, L, K) fp16, `input_ids` (N,), `predicted_ids` (N,) where asked for, and `starts`, the first token of each
window that the model read. Its metadata have the version of this schema, and what the model is.

Shapes legend: N tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import torch

from olmoe.errors import UserError
from olmoe.io.atomic import atomic_file
from olmoe.runner import Batch, CacheView, Runner, Want

SCHEMA = "olmoe-trace-1"
# Tokens that the model reads together, as in the paper's analysis (App. G), if its positions reach that far.
WINDOW = 2048
_DTYPES = {"U8": "<u1", "U16": "<u2", "F16": "<f2", "I32": "<i4", "I64": "<i8"}
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Trace:
    """A trace in memory, or mapped from its file. `NO_EXPERT` of `expert_ids` stands where a token chose fewer."""

    expert_ids: npt.NDArray[np.integer[Any]]
    weights: npt.NDArray[np.float16]
    input_ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    predicted_ids: npt.NDArray[np.int32] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many there are."""
        return int(self.metadata["experts"])

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Map a trace: nothing is read before it is used. Raises `UserError` for what is none."""
        path = Path(path)
        try:
            header, start = _read_header(path)
            metadata = header.pop("__metadata__", {})
            if metadata.get("format") != SCHEMA:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {SCHEMA!r}")
            arrays = {name: _mapped(path, entry, start) for name, entry in header.items()}
            return cls(
                arrays["expert_ids"],
                arrays["weights"],
                arrays["input_ids"],
                np.asarray(arrays["starts"]),
                arrays.get("predicted_ids"),
                metadata,
            )
        except OSError as error:
            raise UserError(f"The trace {path} cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a trace of olmoe ({error}); make one with olmoe analyze.") from None


class TraceWriter:
    """Writes a trace part by part; the file appears when the `with` block has ended well.

    Memory is that of a part. `predictions` says whether predicted ids will be given.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layers: int,
        experts: int,
        top_k: int,
        predictions: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path, self._shape = Path(path), (layers, top_k)
        self.id_dtype = np.dtype("<u1" if experts < 2**8 else "<u2")  # the largest value stands for no expert
        self.tokens = 0
        self._starts: list[int] = []
        self._metadata = {"format": SCHEMA, "experts": str(experts)} | dict(metadata or {})
        self._dtypes = {"expert_ids": self.id_dtype, "weights": np.dtype("<f2"), "input_ids": np.dtype("<i4")}
        if predictions:
            self._dtypes["predicted_ids"] = np.dtype("<i4")
        self._files: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for name in self._dtypes:
            self._files[name] = self._stack.enter_context(tempfile.TemporaryFile(dir=self._path.parent))
        return self

    def start(self) -> None:
        """The next token is the first of a window."""
        self._starts.append(self.tokens)

    def append(
        self,
        expert_ids: npt.NDArray[np.integer[Any]],
        weights: npt.NDArray[np.floating[Any]],
        input_ids: Sequence[int],
        predicted_ids: Sequence[int] | npt.NDArray[np.integer[Any]] = (),
    ) -> None:
        """More tokens: what they chose (n, L, K), -1 for nothing, and the ids read and predicted (n,)."""
        assert expert_ids.shape[1:] == weights.shape[1:] == self._shape, (expert_ids.shape, self._shape)
        assert len(expert_ids) == len(weights) == len(input_ids)
        given = {"expert_ids": expert_ids, "weights": weights, "input_ids": input_ids, "predicted_ids": predicted_ids}
        for name, file in self._files.items():
            assert len(given[name]) == len(input_ids)
            file.write(np.asarray(given[name]).astype(self._dtypes[name]).tobytes())
        self.tokens += len(input_ids)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        names = {np.dtype(code): name for name, code in _DTYPES.items()}
        shapes = dict.fromkeys(self._dtypes, (self.tokens,)) | dict.fromkeys(
            ("expert_ids", "weights"), (self.tokens, *self._shape)
        )
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        starts = np.asarray(self._starts, dtype="<i8")
        for name, shape in [("starts", starts.shape), *shapes.items()]:
            dtype = starts.dtype if name == "starts" else self._dtypes[name]
            end = at + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % 64)
        with atomic_file(self._path) as target, open(target, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text + starts.tobytes())
            for file in self._files.values():
                file.seek(0)
                shutil.copyfileobj(file, out, _COPY_BYTES)


def record(
    runner: Runner, documents: Iterable[Sequence[int]], writer: TraceWriter, *, window: int = WINDOW
) -> Iterator[int]:
    """Run documents (token ids) through a model and write what they choose; yields the tokens of every step.

    A document is read in windows of at most `window` tokens, each with nothing before it, as the paper's analysis does.
    Short ones go through the network together. Predicted ids are recorded if the writer takes them.
    """
    window = min(window, int(runner.config.max_position_embeddings * runner.config.rope.factor))
    group: list[Sequence[int]] = []
    for document in documents:
        for start in range(0, len(document), window):
            part = document[start : start + window]
            if group and sum(map(len, group)) + len(part) > runner.chunk_tokens:
                yield from _record_group(runner, group, writer)
                group = []
            group.append(part)
    if group:
        yield from _record_group(runner, group, writer)


@torch.inference_mode()
def _record_group(runner: Runner, windows: Sequence[Sequence[int]], writer: TraceWriter) -> Iterator[int]:
    """Windows that fit into one step, or a single longer one in several."""
    blocks = runner.new_cache(len(windows), max(map(len, windows)))
    step = runner.chunk_tokens
    table = np.arange(blocks.blocks, dtype=np.int32).reshape(len(windows), -1)
    if len(windows) > 1:
        chunks = [(list(windows), [0] * len(windows))]
    else:
        whole = windows[0]
        chunks = [([whole[start : start + step]], [start]) for start in range(0, len(whole), step)]
    predictions = "predicted_ids" in writer._dtypes
    for parts, lengths in chunks:
        counts, ids = [len(part) for part in parts], [i for part in parts for i in part]
        every = range(len(ids))
        batch = Batch(ids, counts, lengths, [len(each) for each in windows])
        output = runner.forward(batch, CacheView(blocks, table), Want(every if predictions else (), every))
        assert output.trace is not None
        chosen, weights = output.trace.expert_ids.numpy(), output.trace.weights.numpy()
        predicted = output.logits.argmax(dim=-1).cpu().numpy() if predictions else ()
        first = 0
        for count, length in zip(counts, lengths, strict=True):
            if length == 0:
                writer.start()
            end = first + count
            writer.append(chosen[first:end], weights[first:end], ids[first:end], predicted[first:end])
            first = end
        yield len(ids)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(1 << 20, os.path.getsize(path)):
            raise ValueError("it has no header of a safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, 8 + length


def _mapped(path: Path, entry: Mapping[str, Any], data: int) -> npt.NDArray[Any]:
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
    start, end = entry["data_offsets"]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if min(shape, default=0) < 0 or end - start != size or data + end > os.path.getsize(path):
        raise ValueError("its header and its data differ in size; it is cut off or damaged")
    if size == 0:
        return np.zeros(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=data + start, shape=shape)
