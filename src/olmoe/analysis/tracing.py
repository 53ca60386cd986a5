"""The models that an analysis compares, and the traces that it makes of them.

Each domain is first traced into its own file, whose name is a digest of everything that determines its contents.
Earlier checkpoints are loaded and traced one after another, and only their numbers are kept. A run that was interrupted
finds the finished domains and checkpoints there, and continues with the rest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from olmoe.analysis.measurements import measure_revision
from olmoe.analysis.revisions import Revision
from olmoe.analysis.trace import SCHEMA, Trace, TraceWriter, record
from olmoe.errors import UserError
from olmoe.io import hub
from olmoe.io.atomic import write_text
from olmoe.io.documents import Chat, read_documents
from olmoe.io.mapped import forget
from olmoe.runner import make_runner
from olmoe.runtime import resolve_dtype
from olmoe.tokenizer import Tokenizer
from olmoe.weights.checkpoint import Checkpoint

# The trace of the analysed model, and the start of the names of unfinished files.
TRACE, PART = "trace.safetensors", ".part-"
# Windows of a trace that are copied before the pages read are released.
_TOGETHER = 64

Progress = Callable[[int, int], None]
# Token ids by document; lists of them would take ten times the memory.
Documents = list[npt.NDArray[np.int32]]


@dataclass(frozen=True)
class Subject:
    """A model to trace: its files, and its tokenizer."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True)
class Settings:
    """What determines a trace besides the model and the tokens."""

    window: int
    backend: str
    dtype: str
    device: str


def open_subject(model: str | os.PathLike[str] | None, **options: Any) -> Subject:
    """A model to trace, by folder or hub id; None is the shipped one. `options` are those of `Checkpoint.open`."""
    where = hub.SHIPPED_NAME if model is None else os.fspath(model)
    found = Checkpoint.open(where, **options)
    config = found.config
    tokenizer = Tokenizer.from_folder(found.folder, eos_ids=config.eos_token_ids, pad_id=config.pad_token_id)
    # The last part of a path names the model; the rest is specific to a machine.
    return Subject(found, tokenizer, found.folder.resolve().name if os.path.isdir(os.path.expanduser(where)) else where)


def read_ids(path: Path, name: str, subject: Subject, most: int) -> Documents:
    """The first `most` tokens of a text."""
    documents: Documents = []
    left = most
    for document in read_documents(path, f"The text of {name},"):
        ids = _encode(document, subject.tokenizer, left)
        if len(ids):
            documents.append(ids)
            left -= len(ids)
        if left == 0:
            break
    if not documents:
        raise UserError(f"The text of {name}, {path}, is empty; give one with at least a few sentences.")
    largest = max(int(ids.max()) for ids in documents)
    if largest >= subject.checkpoint.config.vocab_size:
        raise UserError(
            f"The tokenizer of {subject.name} gives the id {largest}, but the model has only "
            f"{subject.checkpoint.config.vocab_size} rows; they do not belong together."
        )
    return documents


def _encode(document: str | Chat, tokenizer: Tokenizer, most: int) -> npt.NDArray[np.int32]:
    """Its first ids. Nothing is added before or after a document, as in the paper's analysis."""
    if not isinstance(document, str):
        return np.array(tokenizer.encode_chat(document, add_generation_prompt=False)[:most], dtype=np.int32)
    parts, left = [], most
    for ids in tokenizer.encode_parts(document):
        parts.append(np.array(ids[:left], dtype=np.int32))
        left -= len(parts[-1])
        if left == 0:
            break
    return np.concatenate(parts)


def num_tokens(documents: Documents) -> int:
    """How many there are in all documents."""
    return sum(map(len, documents))


def check_alike(
    subjects: Sequence[Subject], texts: Mapping[str, Any], ids: Mapping[str, Documents], tokens: int
) -> None:
    """Two models can be compared token by token if they read the same ids and have routers of the same shape."""
    one, other = (subject.checkpoint.config for subject in subjects)
    for name in ("num_hidden_layers", "num_experts"):
        if getattr(one, name) != getattr(other, name):
            raise UserError(
                f"{subjects[1].name} has {name} {getattr(other, name)}, but {subjects[0].name} {getattr(one, name)}; "
                "only models of the same shape can be compared."
            )
    if subjects[1].tokenizer is subjects[0].tokenizer:
        return
    for name, path in texts.items():
        read = read_ids(Path(os.path.expanduser(path)), name, subjects[1], tokens)
        if len(read) != len(ids[name]) or not all(map(np.array_equal, read, ids[name])):
            raise UserError(
                f"{subjects[1].name} and {subjects[0].name} read the text of {name} as different tokens, so they "
                "cannot be compared token by token; choose a model with the same tokenizer."
            )


# ---- traces ----


class Count:
    """Tokens that are done, for the progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, tokens: int) -> None:
        """Move the bar by `tokens`."""
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)


def trace_domains(
    subject: Subject, ids: Mapping[str, Documents], settings: Settings, target: Path, count: Count
) -> list[Path]:
    """The trace files of one model's domains; existing ones are not made again."""
    identity = _identity(subject.checkpoint, settings)
    parts = {name: target / f"{PART}{_digest(identity, documents)}.safetensors" for name, documents in ids.items()}
    runner = None
    for name, path in parts.items():
        if path.exists():
            count.add(num_tokens(ids[name]))
            continue
        if runner is None:
            model = subject.checkpoint.load(dtype=resolve_dtype(settings.dtype), device=settings.device)
            runner = make_runner(model, settings.backend)
        with _writer(path, subject) as writer:
            for step in record(runner, ids[name], writer, window=settings.window):
                count.add(step)
    return list(parts.values())


def _writer(path: Path, subject: Subject, metadata: Mapping[str, str] | None = None) -> TraceWriter:
    config = subject.checkpoint.config
    return TraceWriter(
        path,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        predictions=True,
        metadata=metadata,
    )


def _identity(checkpoint: Checkpoint, settings: Settings) -> str:
    """What determines how a model routes. Weights are identified by the sizes and times of their files."""
    files = sorted(path for pattern in ("*.safetensors", "config.json") for path in checkpoint.folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([SCHEMA, str(checkpoint.folder.resolve()), stats, vars(settings)])


def _digest(identity: str, documents: Documents) -> str:
    digest = hashlib.sha256(identity.encode())
    for document in documents:
        digest.update(np.asarray([len(document)], dtype="<i4").tobytes() + document.astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def join(parts: Sequence[Path], names: Sequence[str], path: Path, subject: Subject) -> None:
    """Join the traces of domains into one; its metadata tell them apart."""
    traces = [Trace.open(part) for part in parts]
    ends = list(itertools.accumulate(map(len, traces)))
    domains = [[name, end - len(trace), end] for name, trace, end in zip(names, traces, ends, strict=True)]
    with _writer(path, subject, {"model": subject.name, "domains": json.dumps(domains)}) as writer:
        for trace in traces:
            assert trace.predicted_ids is not None
            chosen, weights, ids, predicted = trace.expert_ids, trace.weights, trace.input_ids, trace.predicted_ids
            for number, window in enumerate(trace.windows()):
                writer.start()
                writer.append(chosen[window], weights[window], ids[window], predicted[window])
                if number % _TOGETHER == 0:
                    for column in (chosen, weights, ids, predicted):
                        forget(column)


@dataclass(frozen=True)
class Sweep:
    """Earlier checkpoints of a model, one at a time: a trace of each is made, measured and removed."""

    subject: Subject
    texts: Mapping[str, str | os.PathLike[str]]
    tokens: int
    ids: Mapping[str, Documents]
    settings: Settings
    target: Path
    count: Count
    options: Mapping[str, Any]

    def numbers(self, each: Revision) -> dict[str, Any]:
        """The numbers of a checkpoint for metrics.json; from an interrupted run, if that got so far."""
        other = self.open(each)
        path = self.target / f"{PART}{self._digest(other)}.json"
        if path.exists():
            self.count.add(sum(map(num_tokens, self.ids.values())))
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        else:
            parts = trace_domains(other, self.ids, self.settings, self.target, self.count)
            whole = path.with_suffix(".safetensors")
            join(parts, list(self.ids), whole, other)
            found = measure_revision(Trace.open(whole), Trace.open(self.target / TRACE))
            write_text(path, json.dumps(found, allow_nan=False) + "\n")
            for part in {*parts, whole}:
                part.unlink()
        return {"name": each.name, "step": each.step} | found

    def open(self, each: Revision) -> Subject:
        """A checkpoint, with the model's tokenizer if it has none; `UserError` if it reads text differently."""
        found = Checkpoint.open(each.place, revision=each.revision, **self.options)
        ours, theirs = (folder / "tokenizer.json" for folder in (self.subject.checkpoint.folder, found.folder))
        if not theirs.exists() or ours.read_bytes() == theirs.read_bytes():
            other = Subject(found, self.subject.tokenizer, each.name)
        else:
            other = replace(open_subject(each.place, revision=each.revision, **self.options), name=each.name)
        check_alike([self.subject, other], self.texts, self.ids, self.tokens)
        return other

    def _digest(self, other: Subject) -> str:
        identities = [_identity(subject.checkpoint, self.settings) for subject in (self.subject, other)]
        return _digest(json.dumps([*identities, list(self.ids)]), [ids for each in self.ids.values() for ids in each])
