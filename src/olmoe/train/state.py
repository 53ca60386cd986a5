"""Resumable checkpoints of a training run: the model in its ordinary format, and everything else beside it.

`RUN/checkpoints/step-000500/` is a checkpoint folder that any loader reads, plus `training_state.pt`
with the optimizer and the counters. Folders appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from olmoe.errors import CheckpointError, ConfigError, UserError, shown
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder, write_text
from olmoe.io.tensor_file import SINGLE_NAME
from olmoe.model import CausalLM
from olmoe.train.run_folder import checkpoints, latest, tracked
from olmoe.train.shards import load_weights, set_moments
from olmoe.train.shared_expert import source_of
from olmoe.weights import export
from olmoe.weights.sharded_folder import METADATA_NAME

STATE_NAME = "training_state.pt"
SHARDED_STATE_NAME = "training_state.json"  # of a run of several processes; see `sharded_state`
_SHARD = re.compile(r"__\d+_\d+\.distcp")


@dataclass
class Progress:
    """The progress of a run. `step` counts finished optimizer steps; `best` is the lowest held-out loss so far."""

    step: int = 0
    tokens: int = 0
    best: float = float("inf")
    best_step: int = 0
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of the last steps: `skipping`

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Progress:
        """The counters of a checkpoint. Those of another version are ignored, or start from their defaults."""
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved or f.name != "recent"}
        return cls(**known)


def begin(folder: Path, resume: bool, overwrite: bool = False) -> Path | None:
    """Make the folder of a run; return the checkpoint to continue from, None for a new run.

    Raises `ConfigError` if the folder holds a run that should not be resumed, or none that can be. With `overwrite`,
    a run is no hindrance if `discard` can delete it.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite deletes it; give one of them.")
    newest = latest(folder)
    if resume:
        _recover_best(folder)
    if resume and newest is None:
        raise ConfigError(f"{folder} holds no checkpoint to resume from; start the run without --resume.")
    if overwrite:
        _written(folder)
        newest = None
    elif not resume:
        _refuse_a_run(folder, newest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be a folder ({error.strerror}); choose another run.output.") from None
    return newest


def _are_records(path: Path) -> bool:
    """Whether a file holds what a run notes of its steps (the last line may be cut short), or nothing."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline()
    try:
        record = json.loads(line) if line.strip() else {"step": 0, "tokens": 0}
    except ValueError:
        return b'{"step": '.startswith(line[:9]) and not line.endswith(b"\n")
    return isinstance(record, dict) and {"step", "tokens"} <= set(record)


def _refuse_a_run(folder: Path, newest: Path | None) -> None:
    """Raise `ConfigError` if a folder holds a run's checkpoints or results."""
    if newest is not None:
        raise ConfigError(
            f"{folder} already holds a run; continue it with --resume, delete it with --overwrite, or choose another "
            "run.output."
        )
    for path in (folder / "best", folder / "evaluation.json", folder / "metrics.jsonl"):
        # A run that was killed before its first checkpoint leaves records, and starts again.
        if path.exists() and not (path.name == "metrics.jsonl" and _are_records(path)):
            raise ConfigError(
                f"{path} is the result of another run; move it, delete it with --overwrite, or choose another "
                "run.output."
            )


def discard(folder: Path) -> None:
    """Delete what a run wrote into its folder; everything else is kept."""
    for path in _written(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written(folder: Path) -> list[Path]:
    """What a run wrote into its folder. Raises `ConfigError` where something else lies among it or in its way."""
    texts = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
    texts |= {"adapter_config.json", "adapter_model.safetensors"}  # of fine-tuning
    names = {
        SINGLE_NAME,
        "config.json",
        "generation_config.json",
        STATE_NAME,
        SHARDED_STATE_NAME,
        METADATA_NAME,
    } | texts
    folders = [path for path in (*checkpoints(folder), folder / "best") if path.exists()]

    def is_own(name: str) -> bool:
        return _SHARD.fullmatch(name) is not None

    metrics, evaluation = folder / "metrics.jsonl", folder / "evaluation.json"
    reference = folder / "reference.npy"  # of learning from preferences
    foreign: list[Path] = [] if not metrics.exists() or _are_records(metrics) else [metrics]
    foreign += [evaluation] if evaluation.exists() and not evaluation.is_file() else []
    for path in folders:
        inside = targets.foreign_entries(path, names, shards=True, also=is_own) if path.is_dir() else [""]
        foreign += [path / name for name in inside]
    if foreign:
        raise ConfigError(
            f"{foreign[0]} was not written by a run, so --overwrite does not delete it; move it, or choose another "
            "run.output."
        )
    return [*folders, *(path for path in (metrics, evaluation, reference, *tracked(folder)) if path.exists())]


def checkpoint_path(folder: Path, progress: Progress) -> Path:
    """Where the checkpoint of that progress belongs."""
    return folder / "checkpoints" / f"step-{progress.step:07d}"


def save_state(
    folder: Path,
    model: CausalLM,
    optimizer: torch.optim.Optimizer | dict[str, Any],
    progress: Progress,
    fingerprint: dict[str, Any],
    extra_files: dict[str, str],
    write_model: Callable[[CausalLM, Path], None] = export.write_model,
) -> Path:
    """Write `checkpoints/step-N` under `folder` and return its path. An optimizer's state may stand for it."""
    target = checkpoint_path(folder, progress)
    with atomic_folder(target) as temporary:
        write_model(model, temporary)
        for name, text in extra_files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        # The fingerprint is stored as JSON text, which compares equal after a round trip.
        state = {
            "optimizer": optimizer if isinstance(optimizer, dict) else optimizer.state_dict(),
            "progress": vars(progress),
            "fingerprint": json.dumps(fingerprint),
        }
        write_state(state, temporary / STATE_NAME)
    return target


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints under `folder`, and what a killed process left unfinished.

    The caller holds the run's lock, so no other process is writing what is unfinished here.
    """
    unfinished = [*folder.glob(".best.*.partial"), *(folder / "checkpoints").glob(".step-*.partial")]
    unfinished += [*(folder.glob(".best.*.old") if has_best(folder) else ()), *folder.glob("checkpoints/.step-*.old")]
    for old in checkpoints(folder)[:-keep]:
        # Renamed first, so that an interrupt leaves no half checkpoint under a whole one's name.
        unfinished.append(old.rename(old.with_name(f".{old.name}.old.partial")))
    for leftover in unfinished:
        shutil.rmtree(leftover, ignore_errors=True)


def has_best(folder: Path) -> bool:
    """Whether the best checkpoint of a run is there."""
    best = folder / "best"
    described = any((best / name).is_file() for name in ("config.json", "adapter_config.json"))
    return described and any(best.glob("*.safetensors"))


def _recover_best(folder: Path) -> None:
    """Put the best checkpoint back that a process was replacing when it was killed; see `atomic_folder`."""
    replaced = sorted(folder.glob(".best.*.old"), key=lambda path: path.stat().st_mtime)
    if replaced and not (folder / "best").exists():
        replaced[-1].rename(folder / "best")


def recorded_names(path: Path | None) -> list[str]:
    """The names of a run's data files, in their order, as its checkpoint recorded them; none of no checkpoint."""
    if path is None:
        return []
    try:
        recorded = _recorded(path)
        return list(dict.fromkeys([*recorded["texts"], *recorded.get("measured", [])]))
    except Exception:  # a damaged file is reported by `restore`
        return []


def check_resumable(path: Path, fingerprint: dict[str, Any]) -> None:
    """Raise `ConfigError` for a checkpoint that a configuration would not continue, before its weights are read."""
    try:
        was = _recorded(path)
    except Exception:  # a damaged file is reported by `restore`
        return
    check_continues(path, was, fingerprint)


def _recorded(path: Path) -> dict[str, Any]:
    """The fingerprint in a checkpoint of one process or of many."""
    if (path / SHARDED_STATE_NAME).is_file():
        found: dict[str, Any] = json.loads((path / SHARDED_STATE_NAME).read_text(encoding="utf-8"))["fingerprint"]
        return found
    # Mapped, because the optimizer's state beside it can be large.
    state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True, mmap=True)
    found = json.loads(state["fingerprint"])
    return found


def restore(path: Path, model: CausalLM, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]) -> Progress:
    """Load a checkpoint of `save_state` into `model` and `optimizer`.

    Raises `ConfigError` if the configuration changed in a way that would not continue the same run, and
    `CheckpointError` if the state is unreadable.
    """
    progress, saved = read_state(path, fingerprint)
    with one_sentence(path):
        load_weights(model, source_of(path, model))
    restore_moments(optimizer, model.parameters(), saved)
    return progress


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], saved: dict[str, Any]
) -> None:
    """Give an optimizer the state that one process saved of these parameters."""
    for parameter, state in zip(parameters, (saved["state"][i] for i in range(len(saved["state"]))), strict=False):
        set_moments(optimizer, parameter, float(state["step"]), state)


def read_state(path: Path, fingerprint: dict[str, Any]) -> tuple[Progress, dict[str, Any]]:
    """Counters and optimizer state of a checkpoint, but for its weights; errors are those of `restore`."""
    try:
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        progress = Progress.from_saved(state["progress"])
        was = json.loads(state["fingerprint"])
        moments: dict[str, Any] = state["optimizer"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise unreadable(path / STATE_NAME, error) from None
    check_continues(path, was, fingerprint)
    return progress, moments


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """What to raise for a file of a checkpoint that is damaged or foreign."""
    # torch's message goes on to suggest loading it unsafely.
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
    return CheckpointError(f"{file} cannot be read ({reason}); {_way_on(file.parent)}.")


def check_continues(path: Path, was: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """Raise `ConfigError` if a checkpoint of the fingerprint `was` would not be continued by this configuration."""
    difference = _difference(was, json.loads(json.dumps(fingerprint)))
    if difference is not None:
        # Who wants to train for longer keeps what was learned; no run starts from an adapter alone.
        is_start = difference.startswith("[schedule]") and not (path / "adapter_config.json").exists()
        start = ", with this checkpoint as its run.initialize_from" if is_start else ""
        raise ConfigError(
            f"{difference} since {path}; change it back, or start a new run in another run.output{start}."
        )


@contextlib.contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Turn errors from reading a checkpoint into one sentence that says how to continue the run."""
    try:
        yield
    except UserError as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(f"The checkpoint {path} cannot be read ({reason}); {_way_on(path)}.") from None


def way_on(run: Path) -> str:
    """How to continue a run that ended because of an error elsewhere."""
    newest = latest(run)
    if newest is None:
        return "it had no checkpoint yet, so start it anew"
    return f"continue it from {newest.name} with --resume"


def _way_on(path: Path) -> str:
    """How to continue a run whose checkpoint `path` is damaged."""
    run = path.parent.parent
    before = [p for p in checkpoints(run) if p.name < path.name]
    if before:
        return f"remove {path} to resume from {before[-1].name}"
    return f"no checkpoint is before it, so start again: remove {run}, or choose another run.output"


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the records of a metrics file that come after `step`, which the resumed run will write again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # answers in them may have other ends of lines, as characters
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short, perhaps within a character
    write_text(path, "".join(kept))


def write_state(state: dict[str, Any], path: Path) -> None:
    """Save everything but the weights. Raises `OSError` if the file system refuses it."""
    try:
        with path.open("wb") as handle:
            torch.save(state, handle)
    except RuntimeError as error:
        # torch hides what the file system refused (a full disk) behind an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing that changed between two fingerprints, in words."""
    for section in {**now, **was}:
        if section == "drawing" and section not in was and "texts" in was:
            return "How windows are drawn from sources with a weight, or with a share of several files, changed"
        if section not in was or section == "measured":  # older versions compared less
            continue
        if section not in now:
            if "seed" in now:  # as in every whole fingerprint; a part of one is compared as far as it goes
                return f"[{section}] was removed"
            continue
        if section == "texts":
            if (difference := _other_texts(was[section], now[section])) is not None:
                return difference
            continue
        old, new = (_comparable(section, values[section]) for values in (was, now))
        if old == new:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            return f"The {section} changed from {shown(old)} to {shown(new)}"
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return f"[{section}] {key} changed from {shown(old.get(key))} to {shown(new.get(key))}"
    return None


def _comparable(name: str, section: Any) -> Any:
    """A section without what may change between a run and its continuation.

    Files may move, since what they hold is compared as `texts`, and the sequences of a step may be shared out in other
    microbatches, for other numbers of ranks.
    """
    if not isinstance(section, dict):
        return section
    if name == "batch" and {"sequences", "accumulation"} <= set(section):
        return {"sequences x accumulation": section["sequences"] * section["accumulation"]}
    plain = {key: value for key, value in section.items() if key != "tokens_folder"}
    for group in ("train", "valid", "measure"):
        if isinstance(plain.get(group), list):
            plain[group] = [{k: v for k, v in source.items() if k != "path"} for source in plain[group]]
    return plain


def _other_texts(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first file with other contents. Files are compared in their order, since names follow from paths."""
    if len(old) != len(new):
        return f"The number of data files changed from {len(old)} to {len(new)}"
    for name, before, after in zip(new, old.values(), new.values(), strict=True):
        if before != after:
            return f"[texts] {name} changed from {shown(before)} to {shown(after)}"
    return None
