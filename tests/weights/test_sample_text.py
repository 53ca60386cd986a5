"""Texts to token ids and windows, and the samples that are shipped."""

from __future__ import annotations

import json

import pytest

from olmoe.errors import UserError
from olmoe.weights import sample_text


def test_documents_end_with_the_end_of_text_token(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One day.\n<|endoftext|>\n\n  The girl ran. \n<|endoftext|>\n", encoding="utf-8")
    eos = tokenizer.eos_ids[0]
    assert sample_text.read_ids(path, tokenizer) == [
        *tokenizer.encode("One day."), eos, *tokenizer.encode("The girl ran."), eos,
    ]  # fmt: skip


def test_json_lines_with_texts_and_chats(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [{"text": "One day."}, {"messages": chat}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    eos = tokenizer.eos_ids[0]
    expected = [*tokenizer.encode("One day."), eos, *tokenizer.encode_chat(chat, add_generation_prompt=False), eos]
    assert sample_text.read_ids(tmp_path / "x.jsonl", tokenizer) == expected


def test_windows():
    assert sample_text.windows([*range(10)], 3, 2) == [[0, 1, 2], [3, 4, 5]]
    assert sample_text.windows([*range(10)], 3, 9) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert sample_text.windows([0, 1], 3, 9) == [[0, 1]]


def test_unreadable_texts(tokenizer, tmp_path):
    (tmp_path / "empty").write_text(" \n<|endoftext|>\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, sentence in (("none", "cannot be read"), ("empty", "is empty"), ("latin", "is not UTF-8"), ("", "read")):
        with pytest.raises(UserError, match=sentence):
            sample_text.read_ids(tmp_path / name, tokenizer)


def test_the_shipped_samples_share_no_sentence():
    texts = [path.read_text(encoding="utf-8") for path in (sample_text.HELD_OUT, sample_text.CALIBRATION)]
    assert all(20_000 < len(text) < 50_000 for text in texts)
    sentences = [{s.strip() for s in text.split(".") if len(s) > 40} for text in texts]
    assert not sentences[0] & sentences[1]
