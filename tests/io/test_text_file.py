"""One decoder for every text: byte order marks are never part of it."""

from __future__ import annotations

import codecs
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from olmoe.cli import generate
from olmoe.config import ModelConfig
from olmoe.io.text_file import decode, read_text
from olmoe.tokenizer import Tokenizer
from olmoe.train.config import load_config
from training_runs import write_run

MARKED = {
    "utf-8": lambda text: text.encode(),
    "utf-8-sig": lambda text: text.encode("utf-8-sig"),
    "utf-16-le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32-le": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    "utf-32-be": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
}
TEXT = "Grüße, 東京 😀 and \ufeff inside\n"


@pytest.mark.parametrize("encoding", MARKED)
def test_the_text_is_the_same_in_every_encoding(encoding, tmp_path):
    data = MARKED[encoding](TEXT + "a\r\nb\rc")
    assert decode(data) == TEXT + "a\r\nb\rc"  # a pipe is read as it is
    (tmp_path / "x").write_bytes(data)
    assert read_text(tmp_path / "x") == TEXT + "a\nb\nc"  # and a file as Python reads it
    assert decode(MARKED[encoding]("")) == ""


def test_what_is_no_text_is_said_as_python_says_it(tmp_path):
    for data in (b"caf\xe9", b"\xff\xfea", b"\xef\xbb\xbf\xff"):
        with pytest.raises(UnicodeDecodeError):
            decode(data)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


@pytest.mark.parametrize("encoding", MARKED)
def test_configurations_tokenizers_and_stdin_may_begin_with_a_mark(encoding, tmp_path, tokenizer_file, monkeypatch):
    plain = load_config(write_run(tmp_path, tokenizer_file))
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_bytes(MARKED[encoding](text))
    assert load_config(tmp_path / "run.toml") == plain
    (tmp_path / "config.json").write_bytes(MARKED[encoding](plain.model.to_json()))
    assert ModelConfig.from_file(tmp_path / "config.json") == plain.model
    (tmp_path / "tokenizer.json").write_bytes(MARKED[encoding](tokenizer_file.read_text(encoding="utf-8")))
    (tmp_path / "tokenizer_config.json").write_bytes(MARKED[encoding](json.dumps({"chat_template": "T"})))
    assert Tokenizer.from_folder(tmp_path).render_chat([{"role": "user", "content": "U"}]) == "T"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(MARKED[encoding](TEXT))))
    assert generate._read_stdin() == TEXT


def test_reading_text_needs_no_torch():
    code = "import sys, olmoe.io.text_file, olmoe.io.documents, olmoe.chat_template; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
