"""What `olmoe analyze` does: runs texts of several domains through a model, and writes a trace, numbers and a page.

The folder that it writes:

    trace.safetensors     which experts every token chose (`olmoe.analysis.trace`), domain after domain
    against.safetensors   the same for the model that it is compared with, if one was given
    metrics.json          the numbers (schema in `olmoe.analysis.measurements`)
    report.html           the figures, each with a sentence about what it shows; one self-contained page
    figure-*.png, .svg    the figures as files, if requested

A run that was interrupted continues (`olmoe.analysis.tracing` says how).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoe.analysis import metrics
from olmoe.analysis.drawing import require_matplotlib
from olmoe.analysis.measurements import agreement, measure, shares
from olmoe.analysis.revisions import find, require_alike
from olmoe.analysis.trace import WINDOW, Trace
from olmoe.analysis.tracing import (
    PART,
    TRACE,
    Count,
    Progress,
    Settings,
    Subject,
    Sweep,
    check_alike,
    join,
    num_tokens,
    open_subject,
    read_ids,
    trace_domains,
)
from olmoe.errors import UserError
from olmoe.io import targets
from olmoe.io.atomic import atomic_file, write_text
from olmoe.ops.dispatch import AUTO
from olmoe.runner import require_backend
from olmoe.runtime import resolve_device, resolve_dtype
from olmoe.tokenizer import Tokenizer

# Tokens per domain, as many as the paper's analysis reads (App. G).
TOKENS = 204_800
AGAINST, METRICS, REPORT = "against.safetensors", "metrics.json", "report.html"
# For the table of tokens (Table 8): the number per expert, and the least number of occurrences.
_TOP_TOKENS, _OCCURRENCES = 15, 10


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
    subjects = [open_subject(model, revision=revision, **options)]
    require_alike(subjects[0].checkpoint.config, earlier, **options)
    ids = {name: read_ids(Path(os.path.expanduser(path)), name, subjects[0], tokens) for name, path in texts.items()}
    if against is not None:
        subjects.append(open_subject(against, **options))
        check_alike(subjects, texts, ids, tokens)
    count = Count(progress, (len(subjects) + len(earlier)) * sum(map(num_tokens, ids.values())))
    sweep = Sweep(subjects[0], texts, tokens, ids, settings, target, count, options)
    for each in earlier:
        if each.revision is None:  # others may have to be downloaded first
            sweep.open(each)
    new = not target.exists()
    try:
        _make(target)
        parts = [trace_domains(subject, ids, settings, target, count) for subject in subjects]
        for subject, files, name in zip(subjects, parts, (TRACE, AGAINST), strict=False):
            join(files, list(ids), target / name, subject)
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


def _check(texts: Mapping[str, Any], tokens: int, window: int, backend: str, dtype: str, device: str) -> Settings:
    if not texts:
        raise UserError("There is no text to analyse; give at least one as NAME=FILE.")
    if not all(name.strip() for name in texts):
        raise UserError("The name of a domain is empty; give each text as NAME=FILE.")
    for name, value in (("tokens", tokens), ("window", window)):
        if value < 1:
            raise UserError(f"The number of {name} must be at least 1, not {value}.")
    require_backend(backend)
    resolve_dtype(dtype)
    return Settings(window, backend, dtype, str(resolve_device(device)))


def _is_part(name: str) -> bool:
    """Whether a file belongs to an unfinished run, or to a killed one, which leaves what it was writing."""
    if name.endswith(".partial"):
        return name.startswith(tuple(f".{each}" for each in (PART, TRACE, AGAINST, METRICS, REPORT, "figure-")))
    return name.startswith(PART) and name.endswith((".safetensors", ".json"))


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


# ---- numbers and pages ----


def _measure(target: Path, subjects: Sequence[Subject]) -> dict[str, Any]:
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
