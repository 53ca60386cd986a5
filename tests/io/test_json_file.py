"""JSON objects in files: read as they are, or what is wrong with them."""

from __future__ import annotations

import pytest

from olmoe.errors import CheckpointError, TokenizerError
from olmoe.io.json_file import read_object, read_optional_object


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_objects_are_read_whatever_begins_them(tmp_path, encoding):
    (tmp_path / "x.json").write_text('{"a": "ä"}\r\n', encoding=encoding)
    assert read_object(tmp_path / "x.json") == read_optional_object(tmp_path / "x.json", TokenizerError) == {"a": "ä"}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000], ids=len)
def test_what_is_not_json_says_why(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="."):
        read_object(tmp_path / "x.json")
    with pytest.raises(TokenizerError, match=r"x.json is not a JSON object \(."):
        read_optional_object(tmp_path / "x.json", TokenizerError)


def test_json_of_another_type_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(TypeError, match=r"^list$"):
        read_object(tmp_path / "x.json")
    with pytest.raises(TokenizerError, match=r"x.json is not a JSON object \(it is list\)\.$"):
        read_optional_object(tmp_path / "x.json", TokenizerError)


def test_files_of_another_kind_are_recognized(tmp_path):
    (tmp_path / "x.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    for read in (
        lambda: read_object(tmp_path / "x.json"),
        lambda: read_optional_object(tmp_path / "x.json", TokenizerError),
    ):
        with pytest.raises(CheckpointError, match="Git LFS pointer"):
            read()


def test_only_an_optional_file_may_be_missing(tmp_path):
    assert read_optional_object(tmp_path / "x.json", TokenizerError) == {}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "x.json")
