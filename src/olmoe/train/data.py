"""Text files to token files to training windows.

A token file is what `dolma tokens` writes and OLMoE was trained on: raw little-endian uint16 ids without
a header (though named `.npy`), one EOS after each document. Windows are cut from the packed stream;
attention crosses documents and positions run on, as in OLMoE's training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from olmoe.atomic import atomic_file, write_text
from olmoe.errors import ConfigError
from olmoe.tokenizer import Tokenizer
from olmoe.train.config import Source

SEPARATOR = "<|endoftext|>"
Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class TokenFile:
    """A token file, and what is known of the text behind it. `text_bytes` is None for foreign token files."""

    path: str
    tokens: int
    documents: int | None = None
    text_bytes: int | None = None
    source_sha256: str | None = None
    tokenizer_sha256: str | None = None


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file, which lines holding only `<|endoftext|>` separate. Empty ones are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"The data file {path} does not exist.") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"The data file {path} is not UTF-8 text ({error}).") from None
    document: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.rstrip("\r\n") == SEPARATOR:
            yield from _whole(document)
            document = []
        else:
            document.append(line)
    yield from _whole(document)


def _whole(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).strip("\n")
    if text:
        yield text


def prepare(path: Path, tokenizer_path: Path, folder: Path, eos_id: int) -> TokenFile:
    """The token file of `path`, made anew unless one of the same text and tokenizer is in `folder`.

    A `.npy` path is taken as a token file as it is. Raises `ConfigError` for missing or unreadable files
    and for a vocabulary that does not fit uint16.
    """
    if path.suffix == ".npy":
        if not path.is_file() or path.stat().st_size % 2:
            raise ConfigError(f"The token file {path} is missing or not made of 2-byte ids.")
        return TokenFile(str(path), path.stat().st_size // 2)
    if not path.is_file():
        raise ConfigError(f"The data file {path} does not exist.")
    wanted = {"source_sha256": _sha256(path), "tokenizer_sha256": _sha256(tokenizer_path)}
    target = folder / f"{path.parent.name}-{path.stem}.npy"
    description = target.with_suffix(".json")
    if target.is_file() and description.is_file():
        known = TokenFile(**json.loads(description.read_text(encoding="utf-8")))
        current = {"source_sha256": known.source_sha256, "tokenizer_sha256": known.tokenizer_sha256}
        if current == wanted and target.stat().st_size == 2 * known.tokens:
            return known
    tokenizer = Tokenizer.from_file(tokenizer_path)
    if tokenizer.vocab_size > 2**16:
        raise ConfigError(f"A vocabulary of {tokenizer.vocab_size} ids does not fit the uint16 token format.")
    documents = list(read_documents(path))
    if not documents:
        raise ConfigError(f"The data file {path} holds no text.")
    stream: list[int] = []
    for ids in tokenizer.encode_batch(documents):
        stream += [*ids, eos_id]
    with atomic_file(target) as temporary:
        np.asarray(stream, dtype="<u2").tofile(temporary)
    text_bytes = sum(len(document.encode()) for document in documents)
    made = TokenFile(str(target), len(stream), len(documents), text_bytes, **wanted)
    write_text(description, json.dumps(asdict(made), indent=2) + "\n")
    return made


def open_tokens(file: TokenFile, vocab_size: int) -> Tokens:
    """Map a token file into memory, read-only. Raises `ConfigError` for ids beyond the model's vocabulary."""
    tokens: Tokens = np.memmap(file.path, dtype="<u2", mode="r")
    largest = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24)) if len(tokens) else 0
    if largest >= vocab_size:
        raise ConfigError(f"{file.path} holds the id {largest}, beyond the model's vocabulary of {vocab_size}.")
    return tokens


class Mixture:
    """An endless, deterministic sequence of training windows over several token files.

    An epoch visits each source `repeat` times, cut into windows of `length` ids from a start drawn anew
    for each pass, all shuffled together. Window `i` depends on the seed and `i` alone, so that a resumed run
    continues exactly. A window of T ids trains T - 1 predictions, as in OLMoE's training.
    """

    def __init__(self, sources: list[tuple[Tokens, float]], length: int, seed: int) -> None:
        self._sources, self._length, self._seed = sources, length, seed
        for tokens, _ in sources:
            if len(tokens) < 2 * length:
                raise ConfigError(
                    f"A data file holds {len(tokens)} tokens, too few for windows of {length}; "
                    "use a longer file or a shorter sequence_length."
                )
        # The largest start leaves every pass the same number of windows, so that epochs are equally long.
        self._windows = [(len(tokens) - length) // length for tokens, _ in sources]
        self._parts = [
            [windows] * math.floor(repeat) + [round(windows * (repeat % 1))]
            for windows, (_, repeat) in zip(self._windows, sources, strict=True)
        ]
        self.windows_per_epoch = sum(sum(parts) for parts in self._parts)
        if self.windows_per_epoch == 0:
            raise ConfigError("The repeat factors leave no training window; raise them.")
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)

    def window(self, index: int) -> npt.NDArray[np.int64]:
        """Training window number `index` (from 0): `length` ids."""
        epoch, place = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        source, start = self._order[place]
        return self._sources[source][0][start : start + self._length].astype(np.int64)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        """(source, start) of every window of an epoch, in training order."""
        generator = np.random.default_rng((self._seed, epoch))
        pieces = []
        for source, parts in enumerate(self._parts):
            for count in parts:
                first = int(generator.integers(self._length))
                chosen = generator.permutation(self._windows[source])[:count]
                starts = first + chosen * self._length
                pieces.append(np.stack((np.full_like(starts, source), starts), axis=1))
        order = np.concatenate(pieces)
        return order[generator.permutation(len(order))]


def load_sources(sources: tuple[Source, ...], files: list[TokenFile], vocab_size: int) -> list[tuple[Tokens, float]]:
    """Open the token files of `sources`, each with its repeat factor."""
    return [(open_tokens(file, vocab_size), source.repeat) for source, file in zip(sources, files, strict=True)]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
