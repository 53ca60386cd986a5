"""The files that a configuration's sources refer to: one file each, or all in a folder or matched by a pattern.

Names identify files in reports and caches. They are made from paths once, when a run starts: a run that was moved
or copied keeps the names that it started with.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olmoe.errors import ConfigError
from olmoe.runtime import log
from olmoe.train.config import Source, TrainConfig
from olmoe.train.data import TokenFile, Tokens, is_description, name_files, open_tokens, origin, prepare, windows_in

# What a folder is searched for; a file that is named, or that a pattern matches, may be called otherwise.
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".npy")
TOKEN_SUFFIXES = (".npy", ".bin")


@dataclass(frozen=True)
class SourceFiles:
    """One source of the configuration and its files."""

    source: Source
    paths: tuple[Path, ...]


def find_files(config: TrainConfig) -> dict[str, list[SourceFiles]]:
    """The files of each source for training, validation and measurement.

    Raises `ConfigError` for a source that has none.
    """
    groups = {"train": config.data.train, "valid": config.data.valid, "measure": config.data.measure}
    return {
        group: [SourceFiles(source, _paths(config.resolve(source.path), source)) for source in sources]
        for group, sources in groups.items()
    }


def _paths(path: Path, source: Source) -> tuple[Path, ...]:
    if path.is_dir():
        return _in_folder(path, TOKEN_SUFFIXES if source.dtype is not None else SUFFIXES)
    if path.exists() or not glob.has_magic(str(path)):
        return (path,)
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    files = tuple(p for p in found if p.is_file())
    if not files:
        raise ConfigError(f"The data files {path} do not exist: the pattern matches none.")
    return files


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    every = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
    # Token files that we made of texts, if they are kept in the same folder, are those texts again.
    made = {p.with_suffix(".npy") for p in every if p.suffix == ".json" and is_description(p)}
    ours = made | {p.with_suffix(".json") for p in made}
    files = tuple(p for p in every if p.suffix.lower() in suffixes and p not in ours)
    others = [p for p in every if p not in ours and p not in files]
    if not files:
        seen = f", but {others[0].name} and the like" if others else ""
        raise ConfigError(f"The data folder {folder} holds no file in {', '.join(suffixes)}{seen}; name the files.")
    if others:
        log.warning("%s: %d files such as %s are not read", folder, len(others), others[0].name)
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def names_of(groups: dict[str, list[SourceFiles]], recorded: list[str]) -> dict[Path, str]:
    """The name of each file: as `recorded` where a run goes on, else by its path. Missing files raise `ConfigError`."""
    ordered = list(dict.fromkeys(path for group in groups.values() for files in group for path in files.paths))
    names = name_files(ordered)
    known = list(dict.fromkeys(names[path] for path in ordered))  # one file by two paths has one name
    # An older run has recorded those of its training and validation, which come first.
    renamed = dict(zip(known, recorded, strict=False))
    if len(set(renamed.values()) | set(known[len(recorded) :])) < len(known):
        return names
    return {path: renamed.get(name, name) for path, name in names.items()}


def prepare_files(
    files: list[SourceFiles], tokenizer_path: Path, folder: Path, eos_id: int, names: dict[Path, str]
) -> list[list[TokenFile]]:
    """The token files of each source; see `prepare`."""
    return [
        [prepare(path, tokenizer_path, folder, eos_id, names[path], found.source.dtype) for path in found.paths]
        for found in files
    ]


def open_sources(
    files: list[SourceFiles], tokens: list[list[TokenFile]], vocab_size: int, length: int
) -> list[tuple[list[Tokens], float]]:
    """The token streams of each source with its repeat factor. Files too short for two windows are joined."""
    streams = [_joined([open_tokens(file, vocab_size) for file in group], length) for group in tokens]
    windows = [sum(max(0, windows_in(stream, length)) for stream in group) for group in streams]
    return list(zip(streams, _repeats([found.source for found in files], windows), strict=True))


def _repeats(sources: list[Source], windows: list[int]) -> list[float]:
    """How often an epoch passes over each source of so many windows.

    With weights an epoch has about as many windows as there are, shared out by them.
    """
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return [source.repeat for source in sources]
    unit = sum(windows) / sum(weights)  # of an epoch for a weight of 1
    # A source without a window is refused later.
    return [weight * unit / max(own, 1) for weight, own in zip(weights, windows, strict=True)]


def _joined(opened: list[Tokens], length: int) -> list[Tokens]:
    short = [tokens for tokens in opened if len(tokens) < 2 * length]
    long = [tokens for tokens in opened if len(tokens) >= 2 * length]
    if len(opened) == 1 or not short:
        return opened
    if long and sum(map(len, short)) < 2 * length:
        smallest = min(range(len(long)), key=lambda i: len(long[i]))
        short.append(long.pop(smallest))
    joined = np.concatenate([np.asarray(tokens, dtype="<i8") for tokens in short])
    if len(joined) < 2 * length:
        raise ConfigError(
            f"{origin(short[0])} and the other files of its source hold {len(joined)} tokens, too few for windows of "
            f"{length}, which need at least {2 * length}; use more text or a data.sequence_length of at most "
            f"{len(joined) // 2}."
        )
    return [*long, joined]
