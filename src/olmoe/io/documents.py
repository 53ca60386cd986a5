"""The documents of a text file or a JSONL file: what training, calibration and measurements read. No torch.

A text file separates documents by lines that hold only `<|endoftext|>`. A `.jsonl` file has one JSON object per line
(a `.json` file a list of them), each with the document as its `text`, or with a chat as its `messages`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoe.errors import UserError, shown
from olmoe.io.text_file import decode, unified_line_ends

SEPARATOR = "<|endoftext|>"
LINES = (".jsonl", ".ndjson")
OBJECTS = (*LINES, ".json")
# The first bytes of files that are not text, and what these files are.
_BEGINNINGS = (
    (b"\x1f\x8b", "compressed by gzip; unpack it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first (unzstd)"),
    (b"BZh", "compressed by bzip2; unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it first (unxz)"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"PAR1", "a Parquet file; write its texts to a .jsonl file first"),
    (b"ARROW1", "an Arrow file; write its texts to a .jsonl file first"),
    (b"\x93NUMPY", "an array of numpy; if it holds token ids, name it .npy"),
    (b"\x89HDF", "an HDF5 file; write its texts to a .jsonl file first"),
    (b"%PDF-", "a PDF file; write its text to a .txt file first"),
)
_TOKENS = "holds token ids; name it .npy, and set the dtype of the source if they are not uint16"

Chat = list[dict[str, Any]]


def read_documents(path: Path, what: str = "The text", error: type[UserError] = UserError) -> Iterator[str | Chat]:
    """The documents of a file in order; those without any text are left out.

    Raises `error`, whose sentence calls the file `what`, if the file cannot be read or is not such a text.
    """
    text = _text(path, what, error)
    suffix = path.suffix.lower()
    if suffix in OBJECTS:
        yield from _from_objects(text, f"{what} {path}", suffix in LINES, error)
    else:
        yield from split_documents(text)


def read_objects(path: Path, what: str, error: type[UserError]) -> Iterator[tuple[str, Any]]:
    """The JSON values of a `.jsonl` or `.json` file, each with its position, for messages.

    Anything but JSON is returned as text. Raises `error`, whose sentence calls the file `what`, if it cannot be read.
    """
    yield from _objects(_text(path, what, error), f"{what} {path}", path.suffix.lower() in LINES)


def split_documents(text: str) -> Iterator[str]:
    """The texts between lines that hold only the separator, apart from trailing spaces. Empty ones are skipped."""
    document: list[str] = []
    for line in text.split("\n"):  # not splitlines, which also splits at a form feed inside a line
        # Files that were joined have byte order marks in the middle of the text.
        if SEPARATOR in line and line.removeprefix("\ufeff").rstrip() == SEPARATOR:
            yield from _whole(document)
            document = []
        else:
            document.append(line)
    yield from _whole(document)


def _whole(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines).removeprefix("\ufeff").strip("\n")
    if text:
        yield text


def _text(path: Path, what: str, error: type[UserError]) -> str:
    """The file's text with every line end as a newline."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{what} {path} cannot be read: it does not exist; check the path.") from None
    except OSError as reason:
        raise error(f"{what} {path} cannot be read ({reason.strerror}); check the path.") from None
    for beginning, kind in _BEGINNINGS:
        if data.startswith(beginning):
            raise error(f"{what} {path} is {kind}.")
    if path.suffix.lower() == ".bin":
        raise error(f"{what} {path} is not a text by its suffix, and probably {_TOKENS}.")
    try:
        text = decode(data)
    except UnicodeDecodeError as reason:
        raise error(f"{what} {path} is not UTF-8 text ({reason}); convert it first.") from None
    if text.count("\0") > len(text) // 4:
        raise error(
            f"{what} {path} is full of NUL characters: it is UTF-16 without a byte order mark, which must be converted "
            f"first, or it {_TOKENS}."
        )
    return unified_line_ends(text)


def _from_objects(text: str, file: str, by_lines: bool, error: type[UserError]) -> Iterator[str | Chat]:
    for where, value in _objects(text, file, by_lines):
        yield from _document(value, where, error)


def _objects(text: str, file: str, by_lines: bool) -> Iterator[tuple[str, Any]]:
    """JSON values: one per line, or all of them in one list."""
    whole = None if by_lines and not text.startswith("[") else _parsed(text)  # some name a list .jsonl
    if isinstance(whole, list):
        for number, value in enumerate(whole, 1):
            yield f"Entry {number} of {_lower(file)}", value
        return
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\ufeff")
        if line:
            yield f"Line {number} of {_lower(file)}", _parsed(line)


def _parsed(text: str) -> Any:
    """The JSON value of `text`; the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _document(value: Any, where: str, error: type[UserError]) -> Iterator[str | Chat]:
    if isinstance(value, dict):
        text, messages = value.get("text"), value.get("messages")
        if isinstance(text, str):
            if text.strip():
                yield text
            return
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            yield messages
            return
    raise error(
        f'{where} is not a JSON object with "text" or "messages", but {shown(value)}; name the file .txt if its own '
        "letters are the text."
    )


def _lower(file: str) -> str:
    return file[0].lower() + file[1:]
