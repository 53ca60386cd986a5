"""Reading text from people and other programs: one decoder for files and pipes, whatever their byte order mark.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one, as editors and shells on Windows write
it. The mark itself is never part of the text.
"""

from __future__ import annotations

import codecs
from pathlib import Path

# The marks of UTF-32 come first: one of them starts with that of little-endian UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes) -> str:
    """The text of `data`, line ends unchanged. Raises `UnicodeDecodeError` if it is not such a text."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    return data.decode("utf-8-sig")


def read_text(path: str | Path) -> str:
    r"""The text of a file, every line end as `\n`. Raises `OSError` and `UnicodeDecodeError`, as `Path.read_text`."""
    return unified_line_ends(decode(Path(path).read_bytes()))


def unified_line_ends(text: str) -> str:
    r"""`text` with the line ends of every system as `\n`."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
