"""Text that models are calibrated and measured on: from files of text or JSONL to token ids to windows.

Each document (see `olmoe.io.documents`) ends with the model's end-of-text token.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from olmoe.errors import UserError
from olmoe.io.documents import Chat, read_documents
from olmoe.tokenizer import Tokenizer

ASSETS = Path(__file__).parent.parent / "assets" / "text"  # its README.md has sources and licences
HELD_OUT, CALIBRATION = ASSETS / "held_out.txt", ASSETS / "calibration.txt"


def read_ids(path: str | os.PathLike[str], tokenizer: Tokenizer) -> list[int]:
    """Token ids of all documents of a file. Raises `UserError` if it cannot be read or holds no text."""
    path = Path(os.path.expanduser(path))
    ids = ids_of(read_documents(path), tokenizer)
    if not ids:
        raise UserError(f"The text {path} is empty; give one with at least a few sentences.")
    return ids


def ids_of(documents: Iterable[str | Chat], tokenizer: Tokenizer) -> list[int]:
    """Token ids of documents: texts, or chats as lists of messages."""
    ids: list[int] = []
    for document in documents:
        if not isinstance(document, str):
            ids += [*tokenizer.encode_chat(document, add_generation_prompt=False), *tokenizer.eos_ids[:1]]
        elif document.strip():
            ids += [*tokenizer.encode(document.strip()), *tokenizer.eos_ids[:1]]
    return ids


def windows(token_ids: list[int], length: int, most: int) -> list[list[int]]:
    """At most `most` consecutive windows of `length` ids; one shorter window if there are too few ids for that."""
    full = [token_ids[i : i + length] for i in range(0, len(token_ids) - length + 1, length)]
    return full[:most] or [token_ids]
