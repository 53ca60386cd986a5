"""What `olmoe analyze` does: runs texts of several domains through a model, and writes a trace, numbers and a page.

The folder that it writes:

    trace.safetensors     which experts every token chose (`olmoe.analysis.trace`), domain after domain
    against.safetensors   the same for the model that it is compared with, if one was given
    metrics.json          the numbers (schema in `olmoe.analysis.measurements`)
    report.html           the figures, each with a sentence about what it shows; one self-contained page
    figure-*.png, .svg    the figures as files, if requested

Each domain is first traced into its own file, whose name is a digest of everything that determines its contents.
Earlier checkpoints are loaded and traced one after another, and only their numbers are kept. A run that was interrupted
finds the finished domains and checkpoints there, and continues with the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from olmoe.analysis import metrics
from olmoe.analysis.drawing import require_matplotlib
from olmoe.analysis.measurements import agreement, measure, measure_revision, shares
from olmoe.analysis.revisions import Revision, find, require_alike
from olmoe.analysis.trace import SCHEMA, WINDOW, Trace, TraceWriter, record
from olmoe.errors import UserError
from olmoe.io import hub, targets
from olmoe.io.atomic import atomic_file, write_text
from olmoe.io.documents import Chat, read_documents
from olmoe.io.mapped import forget
from olmoe.ops.dispatch import AUTO
from olmoe.runner import make_runner, require_backend
from olmoe.runtime import resolve_device, resolve_dtype
from olmoe.tokenizer import Tokenizer
from olmoe.weights.checkpoint import Checkpoint

# Tokens per domain, as many as the paper's analysis reads (App. G).
TOKENS = 204_800
TRACE, AGAINST, METRICS, REPORT = "trace.safetensors", "against.safetensors", "metrics.json", "report.html"
# For the table of tokens (Table 8): the number per expert, and the least number of occurrences.
_TOP_TOKENS, _OCCURRENCES = 15, 10
_PART = ".part-"
# Windows of a trace that are copied before the pages read are released.
_TOGETHER = 64

Progress = Callable[[int, int], None]
# Token ids by document; lists of them would take ten times the memory.
Documents = list[npt.NDArray[np.int32]]


@dataclass(frozen=True)
class _Subject:
    """A model to trace: its files, and its tokenizer."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True)
class _Settings:
    """What determines a trace besides the model and the tokens."""

    window: int
    backend: str
    dtype: str
    device: str


def analyze(
    model: str | os.PathLike[str] | None,
    texts: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    revisions: Sequence[str | os.PathLike[str]] = (),
    tokens: int = TOKENS,
    window: int = WINDOW,
    overwrite: bool = False,
    report: bool = True,
    figures: bool = False,
    backend: str = AUTO,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trace a model on the text of each domain and write the folder `output`; returns what metrics.json holds.

    `texts` are files by the name of their domain; the first `tokens` tokens of each are read. `model` and `against` are
    checkpoint folders or hub ids, packed or not; None means the shipped model. `revisions` are earlier checkpoints to
    compare with the model: branches, tags or commits of its repository, or folders, of checkpoints or of a run of
    `olmoe train`; without a model they are compared with the last of them. `progress(done, total)` is called in tokens.
    Raises `UserError` for what cannot be read or would be overwritten, before anything is traced.
    """
    settings = _check(texts, tokens, window, backend, dtype, device)
    if report or figures:
        require_matplotlib(", or do without them with --no-report (in Python, report=False)")
    target = Path(os.path.expanduser(output))
    _check_target(target, overwrite)
    options: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    earlier = find(None if model is None else os.fspath(model), revision, revisions)
    if model is None and earlier:
        model = earlier.pop().place
    if revisions and not earlier:
        raise UserError("There is no earlier checkpoint to compare with the last; give at least one more revision.")
    subjects = [_open(model, revision=revision, **options)]
    require_alike(subjects[0].checkpoint.config, earlier, **options)
    ids = {name: _read(Path(os.path.expanduser(path)), name, subjects[0], tokens) for name, path in texts.items()}
    if against is not None:
        subjects.append(_open(against, **options))
        _check_alike(subjects, texts, ids, tokens)
    count = _Count(progress, (len(subjects) + len(earlier)) * sum(map(_size, ids.values())))
    sweep = _Sweep(subjects[0], texts, tokens, ids, settings, target, count, options)
    for each in earlier:
        if each.revision is None:  # others may have to be downloaded first
            sweep.open(each)
    new = not target.exists()
    try:
        _make(target)
        parts = [_trace(subject, ids, settings, target, count) for subject in subjects]
        for subject, files, name in zip(subjects, parts, (TRACE, AGAINST), strict=False):
            _join(files, list(ids), target / name, subject)
        found = _measure(target, subjects)
        if earlier:
            found["revisions"] = [sweep.numbers(each) for each in earlier]
        _write_pictures(found, target, report, figures)
        # Last: a folder with numbers is finished, and is not continued.
        write_text(target / METRICS, json.dumps(found, allow_nan=False) + "\n")
        _clear(target, {TRACE, METRICS, *([AGAINST] if against is not None else [])}, report, figures)
    except BaseException:
        if new:  # nothing is left of a run that has not finished a domain
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    return found


# ---- what was asked for ----


def _check(texts: Mapping[str, Any], tokens: int, window: int, backend: str, dtype: str, device: str) -> _Settings:
    if not texts:
        raise UserError("There is no text to analyse; give at least one as NAME=FILE.")
    if not all(name.strip() for name in texts):
        raise UserError("The name of a domain is empty; give each text as NAME=FILE.")
    for name, value in (("tokens", tokens), ("window", window)):
        if value < 1:
            raise UserError(f"The number of {name} must be at least 1, not {value}.")
    require_backend(backend)
    resolve_dtype(dtype)
    return _Settings(window, backend, dtype, str(resolve_device(device)))


def _is_part(name: str) -> bool:
    """Whether a file belongs to an unfinished run, or to a killed one, which leaves what it was writing."""
    if name.endswith(".partial"):
        return name.startswith(tuple(f".{each}" for each in (_PART, TRACE, AGAINST, METRICS, REPORT, "figure-")))
    return name.startswith(_PART) and name.endswith((".safetensors", ".json"))


def _is_figure(name: str) -> bool:
    return name.startswith("figure-") and name.endswith((".png", ".svg"))


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse an existing folder, unless it has parts but no numbers: that is an interrupted run, which continues."""
    found = targets.entries(target) if target.is_dir() else []
    ours = {TRACE, AGAINST, METRICS, REPORT, *(name for name in found if _is_part(name) or _is_figure(name))}
    unfinished = any(map(_is_part, found)) and METRICS not in found
    targets.check_folder(target, ours, overwrite=overwrite or unfinished)
    targets.check_place(target / TRACE)


def _make(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another place.") from None


def _open(model: str | os.PathLike[str] | None, **options: Any) -> _Subject:
    where = hub.SHIPPED_NAME if model is None else os.fspath(model)
    found = Checkpoint.open(where, **options)
    config = found.config
    tokenizer = Tokenizer.from_folder(found.folder, eos_ids=config.eos_token_ids, pad_id=config.pad_token_id)
    # The last part of a path names the model; the rest is specific to a machine.
    return _Subject(
        found, tokenizer, found.folder.resolve().name if os.path.isdir(os.path.expanduser(where)) else where
    )


def _read(path: Path, name: str, subject: _Subject, most: int) -> Documents:
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


def _size(documents: Documents) -> int:
    return sum(map(len, documents))


def _check_alike(
    subjects: Sequence[_Subject], texts: Mapping[str, Any], ids: Mapping[str, Documents], tokens: int
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
        read = _read(Path(os.path.expanduser(path)), name, subjects[1], tokens)
        if len(read) != len(ids[name]) or not all(map(np.array_equal, read, ids[name])):
            raise UserError(
                f"{subjects[1].name} and {subjects[0].name} read the text of {name} as different tokens, so they "
                "cannot be compared token by token; choose a model with the same tokenizer."
            )


# ---- traces ----


class _Count:
    """Tokens that are done, for the progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)


def _trace(
    subject: _Subject, ids: Mapping[str, Documents], settings: _Settings, target: Path, count: _Count
) -> list[Path]:
    """The trace files of one model's domains; existing ones are not made again."""
    identity = _identity(subject.checkpoint, settings)
    parts = {name: target / f"{_PART}{_digest(identity, documents)}.safetensors" for name, documents in ids.items()}
    config = subject.checkpoint.config
    runner = None
    for name, path in parts.items():
        if path.exists():
            count.add(_size(ids[name]))
            continue
        if runner is None:
            model = subject.checkpoint.load(dtype=resolve_dtype(settings.dtype), device=settings.device)
            runner = make_runner(model, settings.backend)
        with TraceWriter(
            path,
            layers=config.num_hidden_layers,
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            predictions=True,
        ) as writer:
            for step in record(runner, ids[name], writer, window=settings.window):
                count.add(step)
    return list(parts.values())


def _identity(checkpoint: Checkpoint, settings: _Settings) -> str:
    """What determines how a model routes. Weights are identified by the sizes and times of their files."""
    files = sorted(path for pattern in ("*.safetensors", "config.json") for path in checkpoint.folder.glob(pattern))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([SCHEMA, str(checkpoint.folder.resolve()), stats, vars(settings)])


def _digest(identity: str, documents: Documents) -> str:
    digest = hashlib.sha256(identity.encode())
    for document in documents:
        digest.update(np.asarray([len(document)], dtype="<i4").tobytes() + document.astype("<i4").tobytes())
    return digest.hexdigest()[:32]


def _join(parts: Sequence[Path], names: Sequence[str], path: Path, subject: _Subject) -> None:
    """Join the domains into one trace; its metadata tell them apart."""
    traces = [Trace.open(part) for part in parts]
    ends = list(itertools.accumulate(map(len, traces)))
    domains = [[name, end - len(trace), end] for name, trace, end in zip(names, traces, ends, strict=True)]
    config = subject.checkpoint.config
    with TraceWriter(
        path,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        predictions=True,
        metadata={"model": subject.name, "domains": json.dumps(domains)},
    ) as writer:
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
class _Sweep:
    """Earlier checkpoints of a model, one at a time: a trace of each is made, measured and removed."""

    subject: _Subject
    texts: Mapping[str, str | os.PathLike[str]]
    tokens: int
    ids: Mapping[str, Documents]
    settings: _Settings
    target: Path
    count: _Count
    options: Mapping[str, Any]

    def numbers(self, each: Revision) -> dict[str, Any]:
        """The numbers of a checkpoint for metrics.json; from an interrupted run, if that got so far."""
        other = self.open(each)
        path = self.target / f"{_PART}{self._digest(other)}.json"
        if path.exists():
            self.count.add(sum(map(_size, self.ids.values())))
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        else:
            parts = _trace(other, self.ids, self.settings, self.target, self.count)
            whole = path.with_suffix(".safetensors")
            _join(parts, list(self.ids), whole, other)
            found = measure_revision(Trace.open(whole), Trace.open(self.target / TRACE))
            write_text(path, json.dumps(found, allow_nan=False) + "\n")
            for part in {*parts, whole}:
                part.unlink()
        return {"name": each.name, "step": each.step} | found

    def open(self, each: Revision) -> _Subject:
        """A checkpoint, with the model's tokenizer if it has none; `UserError` if it reads text differently."""
        found = Checkpoint.open(each.place, revision=each.revision, **self.options)
        ours, theirs = (folder / "tokenizer.json" for folder in (self.subject.checkpoint.folder, found.folder))
        if not theirs.exists() or ours.read_bytes() == theirs.read_bytes():
            other = _Subject(found, self.subject.tokenizer, each.name)
        else:
            other = replace(_open(each.place, revision=each.revision, **self.options), name=each.name)
        _check_alike([self.subject, other], self.texts, self.ids, self.tokens)
        return other

    def _digest(self, other: _Subject) -> str:
        identities = [_identity(subject.checkpoint, self.settings) for subject in (self.subject, other)]
        return _digest(json.dumps([*identities, list(self.ids)]), [ids for each in self.ids.values() for ids in each])


# ---- numbers and pages ----


def _measure(target: Path, subjects: Sequence[_Subject]) -> dict[str, Any]:
    trace = Trace.open(target / TRACE)
    found = measure(trace)
    found["top_tokens"] = top_tokens(trace, subjects[0].tokenizer)
    if len(subjects) > 1:
        other = Trace.open(target / AGAINST)
        found["against"] = {
            "model": subjects[1].name,
            "domains": agreement(trace, other),
            "shares": shares(other),
        }
    return found


def top_tokens(trace: Trace, tokenizer: Tokenizer, layer: int | None = None) -> dict[str, Any]:
    """The tokens that experts of a layer (by default a middle one) take most of by first choices (Table 8).

    Only tokens that occur at least ten times, as [text, share of its occurrences, occurrences]; experts that take none
    are left out.
    """
    if layer is None:
        layer = (trace.expert_ids.shape[1] - 1) // 2
    found = metrics.vocabulary(trace.expert_ids, trace.input_ids, layer, trace.experts, 1)
    number = dict(zip(found.ids.tolist(), found.total.tolist(), strict=True))
    experts = {}
    for expert in range(trace.experts):
        listed = found.top_ids(expert, _TOP_TOKENS, _OCCURRENCES)
        if listed:
            experts[str(expert)] = [
                [tokenizer.token_bytes(i).decode("utf-8", errors="backslashreplace"), share, number[i]]
                for i, share in listed
            ]
    return {"layer": layer, "least": _OCCURRENCES, "experts": experts}


def _write_pictures(found: dict[str, Any], target: Path, report: bool, figures: bool) -> None:
    if not report and not figures:
        return
    from olmoe.analysis.drawing import image_bytes
    from olmoe.analysis.figures import draw
    from olmoe.analysis.report import page

    drawn = draw(found)
    if report:
        write_text(target / REPORT, page(found, drawn))
    if figures:
        for name, figure in drawn.items():
            for kind in ("png", "svg"):
                with atomic_file(target / f"figure-{name}.{kind}") as temporary:
                    temporary.write_bytes(image_bytes(figure, kind))


def _clear(target: Path, written: set[str], report: bool, figures: bool) -> None:
    """Remove parts, and what is left of an earlier run that was replaced."""
    for name in _stale(target, written, report, figures):
        (target / name).unlink()


def _stale(target: Path, written: set[str], report: bool, figures: bool) -> Iterator[str]:
    for name in targets.entries(target):
        kept = name in written or (report and name == REPORT) or (figures and _is_figure(name))
        if not kept and (name in (TRACE, AGAINST, METRICS, REPORT) or _is_part(name) or _is_figure(name)):
            yield name
