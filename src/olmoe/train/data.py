"""Text and JSONL files to token files to training windows.

A token file is what `dolma tokens` writes and OLMoE was trained on: raw little-endian uint16 ids without
a header (though named `.npy`), one EOS after each document. Windows are cut from the packed stream;
attention crosses documents and positions run on, as in OLMoE's training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from olmoe.errors import ConfigError
from olmoe.io import documents
from olmoe.io.atomic import atomic_file, write_text
from olmoe.io.documents import Chat
from olmoe.tokenizer import Tokenizer
from olmoe.train.foreign_tokens import Layout, map_ids, read_layout

SEPARATOR = documents.SEPARATOR
READER = 2  # 1 read byte order marks, spaces after separators and JSONL as text
Tokens = npt.NDArray[Any]
_PART = 2**24  # ids that are checked at a time
_LOOKED_AT = 2**28  # ids of a file that are checked before training


@dataclass(frozen=True)
class TokenFile:
    """A token file, the name it is reported under, and what is known about the text it was made from.

    All but the first three are None for foreign token files.
    """

    name: str
    path: str
    tokens: int
    documents: int | None = None
    text_bytes: int | None = None
    eos_id: int | None = None
    source_sha256: str | None = None
    tokenizer_sha256: str | None = None
    template_sha256: str | None = None
    reader: int = 1  # version of what turned the text into documents
    dtype: str = "<u2"
    offset: int = 0  # bytes before the ids


def name_files(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each data file: its folder and stem, and more of its path if another file shares these.

    Raises `ConfigError` for a file that does not exist.
    """
    whole = {path: Path(os.path.abspath(path)) for path in paths}
    candidates: dict[Path, list[str]] = {}
    for path, absolute in whole.items():
        if not path.is_file():
            wrong = "is a folder; name a file in it" if path.is_dir() else "does not exist"
            raise ConfigError(f"The data file {path} {wrong}.")
        parts = absolute.with_suffix("").parts[1:]
        shorter = ["-".join(parts[-n:]) for n in range(min(2, len(parts)), len(parts) + 1)]
        # The whole path in the end, because two files may differ in nothing but their suffix.
        candidates[absolute] = [*shorter, quote(str(absolute), safe="")]
    uses = Counter(name for names in candidates.values() for name in names)
    return {path: next(n for n in candidates[absolute] if uses[n] == 1) for path, absolute in whole.items()}


def read_documents(path: Path) -> Iterator[str | Chat]:
    """The documents of a text or JSONL file; see `olmoe.io.documents`. Raises `ConfigError` for other files."""
    return documents.read_documents(path, "The data file", ConfigError)


def plain_text(document: str | Chat) -> str:
    """The text that a vocabulary is trained on: for a chat, the texts of its messages."""
    if isinstance(document, str):
        return document
    return "\n".join(m["content"] for m in document if isinstance(m.get("content"), str))


def is_token_file(path: Path, dtype: str | None = None) -> bool:
    """Whether a data file holds ids rather than text: by its name, or because the configuration says so."""
    return dtype is not None or path.suffix.lower() == ".npy"


def prepare(
    path: Path, tokenizer_path: Path, folder: Path, eos_id: int, name: str | None = None, dtype: str | None = None
) -> TokenFile:
    """The token file for `path`, rebuilt unless `folder` holds one of the same text, tokenizer and EOS.

    It is kept as `name`, by default the name that `name_files` gives to `path` alone. A `.npy` path is used as a
    token file directly, and so is any path if `dtype` says what its ids are. Raises `ConfigError` for missing or
    unreadable files and for a vocabulary that does not fit uint16.
    """
    name = name or name_files([path])[path]
    if is_token_file(path, dtype):
        layout = read_layout(path, dtype)
        return TokenFile(name, str(path), layout.count, dtype=layout.dtype, offset=layout.offset)
    tokenizer = _tokenizer(tokenizer_path, eos_id)
    wanted: dict[str, Any] = {
        "source_sha256": sha256(path),
        "tokenizer_sha256": sha256(tokenizer_path),
        "eos_id": eos_id,
        "reader": READER,
    }
    if path.suffix.lower() in documents.OBJECTS:  # they may hold chats
        wanted["template_sha256"] = _template_sha256(tokenizer)
    # Not with_suffix: a name may hold dots.
    target, description = folder / f"{name}.npy", folder / f"{name}.json"
    known = _described(description)
    if (
        target.is_file()
        and all(known.get(key) == value for key, value in wanted.items())
        and target.stat().st_size == 2 * known.get("tokens", 0)
    ):
        # The folder may be reached by another path than when the description was written.
        return TokenFile(**known | {"name": name, "path": str(target)})
    if tokenizer.vocab_size > 2**16:
        raise ConfigError(f"A vocabulary of {tokenizer.vocab_size} ids does not fit the uint16 token format.")
    found = list(read_documents(path))
    if not found:
        raise ConfigError(f"The data file {path} holds no text.")
    stream: list[int] = []
    for ids in encode_documents(found, tokenizer):
        stream += [*ids, eos_id]
    with atomic_file(target) as temporary:
        temporary.write_bytes(np.asarray(stream, dtype="<u2").tobytes())  # tofile hides why a write failed
        description.unlink(missing_ok=True)  # before the rename, so that it never describes another file's tokens
    texts = (x if isinstance(x, str) else tokenizer.render_chat(x, add_generation_prompt=False) for x in found)
    text_bytes = sum(len(text.encode()) for text in texts)
    made = TokenFile(name, str(target), len(stream), len(found), text_bytes, **wanted)
    write_text(description, json.dumps(asdict(made), indent=2) + "\n")
    return made


def encode_documents(found: list[str | Chat], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of each document; a chat's are those of the whole chat, without a prompt for what comes next."""
    texts = iter(tokenizer.encode_batch([document for document in found if isinstance(document, str)]))
    for document in found:
        if isinstance(document, str):
            yield next(texts)
        else:
            yield tokenizer.encode_chat(document, add_generation_prompt=False)


def _tokenizer(path: Path, eos_id: int) -> Tokenizer:
    """A tokenizer file, with the chat template beside it."""
    if path.name == "tokenizer.json":
        return Tokenizer.from_folder(path.parent, eos_ids=(eos_id,))
    return Tokenizer.from_file(path, eos_ids=(eos_id,))


def _template_sha256(tokenizer: Tokenizer) -> str:
    """What the ids of a chat depend on besides the tokenizer file."""
    parts = [tokenizer.chat_template, tokenizer.named_templates, tokenizer.special_tokens()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _described(description: Path) -> dict[str, Any]:
    """The contents of a description file; empty if it is missing, damaged or of another version."""
    try:
        known = json.loads(description.read_text(encoding="utf-8"))
        return asdict(TokenFile(**known))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def is_description(path: Path) -> bool:
    """Whether a JSON file is what `prepare` writes beside a token file."""
    return bool(_described(path))


def open_tokens(file: TokenFile, vocab_size: int) -> Tokens:
    """Map a token file into memory, read-only. Raises `ConfigError` for ids beyond the model's vocabulary.

    In large files only some ids are checked here, because reading terabytes takes hours; a `Mixture` checks the
    others when their turn comes.
    """
    layout = Layout(file.dtype, file.offset, file.tokens)
    tokens: Tokens = map_ids(file.path, layout)
    starts = range(0, len(tokens), _PART)
    if len(tokens) > _LOOKED_AT:
        starts = starts[:: len(starts) // (_LOOKED_AT // _PART) + 1]
    hint = "" if file.source_sha256 else f"; if its ids are not {np.dtype(file.dtype)}, set dtype beside its path"
    for start in starts:
        _refuse_beyond(tokens[start : start + _PART], vocab_size, file.path, hint)
    return tokens


def _refuse_beyond(ids: Tokens, vocab_size: int, path: str, hint: str = "") -> None:
    largest, smallest = int(ids.max()), int(ids.min())
    if largest >= vocab_size or smallest < 0:
        wrong = largest if largest >= vocab_size else smallest
        raise ConfigError(f"{path} holds the id {wrong}, beyond the model's vocabulary of {vocab_size}{hint}.")


def windows_in(tokens: Tokens, length: int) -> int:
    """How many windows one pass over a stream has: wherever it starts, so that epochs are equally long."""
    return (len(tokens) - length) // length


@dataclass(frozen=True)
class _Group:
    """The windows of a source's streams, and how often an epoch passes over them."""

    windows: list[int]
    repeat: float

    @property
    def windows_per_epoch(self) -> int:
        return sum(self.windows) * math.floor(self.repeat) + self._of_fraction

    @property
    def _of_fraction(self) -> int:
        """Windows of the pass that is not whole."""
        return round(sum(self.windows) * (self.repeat % 1))

    def passes(self, generator: np.random.Generator) -> Iterator[tuple[int, list[int]]]:
        """For each stream its windows, and how many of them an epoch takes in each pass.

        The last pass takes a share. Rounded for each stream by itself, that of short ones would be another one than is
        wanted, or none; so what is left over by one goes to the next, from a point that is drawn again each epoch.
        """
        total, part = sum(self.windows), self._of_fraction
        shift = int(generator.integers(total)) if part and len(self.windows) > 1 else 0
        behind = 0
        for windows in self.windows:
            count = ((behind + windows) * part + shift) // total - (behind * part + shift) // total
            behind += windows
            yield windows, [windows] * math.floor(self.repeat) + [count]


class Mixture:
    """An endless, deterministic sequence of training windows over several token files.

    An epoch visits each source, one stream of ids or several, `repeat` times, cut into windows of `length` ids from a
    start drawn again for each pass, all shuffled together. What is left over at a stream's end, up to a window, is not
    visited in any pass. Window `i` depends only on the seed and `i`, so that a resumed run continues exactly. A window
    of T ids trains T - 1 predictions, as in OLMoE's training.

    With `vocab_size`, a window with an id beyond it raises `ConfigError`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Tokens | list[Tokens], float]],
        length: int,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        self._length, self._seed, self._vocab_size = length, seed, vocab_size
        groups = [tokens if isinstance(tokens, list) else [tokens] for tokens, _ in sources]
        self._streams = [tokens for group in groups for tokens in group]
        self._groups: list[_Group] = []
        for group, (_, repeat) in zip(groups, sources, strict=True):
            for tokens in group:
                if len(tokens) < 2 * length:
                    raise ConfigError(
                        f"{origin(tokens)} holds {len(tokens)} tokens, too few for windows of {length}, which need at "
                        f"least {2 * length}; use a longer file or a data.sequence_length of at most "
                        f"{len(tokens) // 2}."
                    )
            self._groups.append(_Group([windows_in(tokens, length) for tokens in group], repeat))
            if self._groups[-1].windows_per_epoch == 0:
                raise ConfigError(
                    f"An epoch passes {repeat:g} times over {origin(group[0])}, which is less than one window; raise "
                    "its repeat or weight."
                )
        self.windows_per_epoch = sum(group.windows_per_epoch for group in self._groups)
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)

    def window(self, index: int) -> npt.NDArray[np.int64]:
        """Training window number `index` (from 0): `length` ids."""
        epoch, position = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        stream, start = self._order[position]
        tokens = self._streams[stream]
        ids: npt.NDArray[np.int64] = tokens[start : start + self._length].astype(np.int64)
        if self._vocab_size is not None:
            _refuse_beyond(ids, self._vocab_size, origin(tokens))
        return ids

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """(stream, start) of every window of an epoch, in training order."""
        generator = np.random.default_rng((self._seed, epoch))
        chosen_of = []
        passes = (each for group in self._groups for each in group.passes(generator))
        for stream, (windows, counts) in enumerate(passes):
            for count in counts:
                first = int(generator.integers(self._length))
                chosen = generator.permutation(windows)[:count]
                starts = first + chosen * self._length
                chosen_of.append(np.stack((np.full_like(starts, stream), starts), axis=1))
        order = np.concatenate(chosen_of)
        return order[generator.permutation(len(order))]


def origin(tokens: Tokens) -> str:
    """The file that tokens were mapped from, for messages."""
    return str(getattr(tokens, "filename", "A data source"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sample_sha256(file: TokenFile) -> str:
    """The SHA-256 of a token file's start and end: enough to identify what would take minutes to hash."""
    digest = hashlib.sha256()
    with open(file.path, "rb") as handle:
        digest.update(handle.read(2**20))
        handle.seek(max(0, os.path.getsize(file.path) - 2**20))
        digest.update(handle.read())
    return digest.hexdigest()
