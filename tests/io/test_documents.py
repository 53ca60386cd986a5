"""Documents of text and JSONL files, and what is no such file."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest

from olmoe.errors import ConfigError
from olmoe.io.documents import read_documents
from sentences import refused

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def documents(tmp_path, name: str, data: bytes | str):
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_documents(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text_and_hides_no_separator(encoding, tmp_path):
    text = "<|endoftext|>\none é\n<|endoftext|> \t\ntwo\n<|endoftext|>\u00a0\r\nthree"
    assert documents(tmp_path, "x.txt", text.encode(encoding)) == ["one é", "two", "three"]


def test_marks_of_joined_files_are_no_text_either(tmp_path):
    part = "<|endoftext|>\none\n".encode("utf-8-sig")
    assert documents(tmp_path, "x.txt", part + part) == ["one", "one"]
    first = "one\n<|endoftext|>\n".encode("utf-8-sig")
    assert documents(tmp_path, "x.txt", first + first) == ["one", "one"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_lines_are_read_by_their_fields(name, encoding, tmp_path):
    values = [{"text": "one\nline é", "id": 3}, {"text": " "}, {"messages": CHAT}, {"text": " two ", "messages": None}]
    lines = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\r\n"
    expected = ["one\nline é", CHAT, " two "]
    assert documents(tmp_path, name, lines.encode(encoding)) == expected
    # A list has the suffix .json, but some have another one.
    assert documents(tmp_path, name, json.dumps(values, indent=1).encode(encoding)) == expected


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '"text"', "{}", '{"text": 3}', '{"content": "x"}', '{"messages": []}', '{"messages": ["Hi"]}', "word"],
)
def test_other_lines_are_refused_by_number(line, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    message = refused(lambda: list(read_documents(tmp_path / "x.jsonl", "The data file", ConfigError)), ConfigError)
    assert message.startswith("Line 3 of the data file ")
    (tmp_path / "x.json").write_text('[{"text": "fine"}, 7]', encoding="utf-8")
    assert "Entry 2 of the text" in refused(lambda: list(read_documents(tmp_path / "x.json")))


def saved(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("x.txt.gz", gzip.compress(b"text"), "gunzip"),
        ("x.jsonl", gzip.compress(b"{}"), "gunzip"),
        ("x.zst", b"\x28\xb5\x2f\xfd....", "zstd"),
        ("x.bz2", b"BZh91AY", "bzip2"),
        ("x.xz", b"\xfd7zXZ\x00", "xz"),
        ("x.zip", b"PK\x03\x04", "zip"),
        ("x.parquet", b"PAR1", "Parquet"),
        ("x.dat", saved(np.arange(9)), "numpy"),
        ("x.bin", np.arange(30000, 30100, dtype="<u2").tobytes(), "token ids"),
        ("x.bin", b"words", "dtype"),
        ("x.ids", np.arange(100, dtype="<u2").tobytes(), "token ids"),  # valid UTF-8 as it happens
        ("x.txt", "text without a mark".encode("utf-16-le"), "UTF-16"),
        ("x.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_named_with_a_remedy(name, data, told, tmp_path):
    assert told in refused(lambda: documents(tmp_path, name, data))


def test_a_rare_nul_character_is_text(tmp_path):
    assert documents(tmp_path, "x.txt", "a word\0 and more") == ["a word\0 and more"]
