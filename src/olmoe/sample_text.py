"""Text that models are calibrated and measured on: plain files, to token ids, to windows.

Documents are separated by a line holding `<|endoftext|>`; each ends with the model's end-of-text token.
"""

from __future__ import annotations

import os
from pathlib import Path

from olmoe.errors import UserError
from olmoe.tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "assets" / "text"  # sources and status in its README.md
HELD_OUT, CALIBRATION = ASSETS / "held_out.txt", ASSETS / "calibration.txt"
SEPARATOR = "<|endoftext|>"


def read_ids(path: str | Path, tokenizer: Tokenizer) -> list[int]:
    """Token ids of all documents of a UTF-8 file. Raises `UserError` if it cannot be read or holds no text."""
    path = Path(os.path.expanduser(path))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"The text {path} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"The text {path} is not UTF-8 ({error}); convert it first.") from None
    ids: list[int] = []
    for document in text.split(SEPARATOR):
        if document.strip():
            ids += [*tokenizer.encode(document.strip()), *tokenizer.eos_ids[:1]]
    if not ids:
        raise UserError(f"The text {path} is empty; give one with at least a few sentences.")
    return ids


def windows(token_ids: list[int], length: int, most: int) -> list[list[int]]:
    """At most `most` consecutive windows of `length` ids; one shorter window if there are not enough for one."""
    full = [token_ids[i : i + length] for i in range(0, len(token_ids) - length + 1, length)]
    return full[:most] or [token_ids]
