"""Token files as dolma writes them, their cache, and the order of training windows."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configurations import VOCAB_SIZE
from olmoe.errors import ConfigError, UserError
from olmoe.tokenizer import Tokenizer
from olmoe.train import data
from olmoe.train.config import Source
from olmoe.train.data import Mixture, name_files, open_tokens, prepare, read_documents
from olmoe.train.sources import SourceFiles, open_sources
from sentences import refused

EOS = VOCAB_SIZE - 1


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- documents ----


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n<|endoftext|>\ntwo\nlines\n", ["one", "two\nlines"]),
        ("one", ["one"]),
        ("one\n<|endoftext|>", ["one"]),
        ("<|endoftext|>\n\n\n<|endoftext|>\none\n\n<|endoftext|>\n<|endoftext|>\n", ["one"]),  # empty documents
        ("a <|endoftext|> b\n <|endoftext|>\nc", ["a <|endoftext|> b\n <|endoftext|>\nc"]),  # not alone on its line
        ("a\n\n  b  \n\n\nc\n", ["a\n\n  b  \n\n\nc"]),  # white space inside stays
        ("one\r\n<|endoftext|>\r\ntwo\r\n", ["one", "two"]),  # a file from Windows
        ("a\x0c<|endoftext|>\nb\u2028<|endoftext|>\nc", ["a\x0c<|endoftext|>\nb\u2028<|endoftext|>\nc"]),
        ("", []),
    ],
)
def test_documents_are_split_at_separator_lines(tmp_path, text, documents):
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert list(read_documents(tmp_path / "x.txt")) == documents


def test_unreadable_texts_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "latin.txt" in refused(lambda: list(read_documents(tmp_path / "latin.txt")), ConfigError)
    assert "none.txt" in refused(lambda: list(read_documents(tmp_path / "none.txt")), ConfigError)
    refused(lambda: list(read_documents(tmp_path)), ConfigError)


# ---- token files ----


def test_a_token_file_is_raw_little_endian_uint16_with_an_eos_after_each_document(tmp_path, tokenizer_file):
    path = write(tmp_path / "texts" / "two.txt", "The dog ran.\n<|endoftext|>\nThe girl.\n")
    file = prepare(path, tokenizer_file, tmp_path / "tokens", EOS)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    expected = [*tokenizer.encode("The dog ran."), EOS, *tokenizer.encode("The girl."), EOS]
    assert Path(file.path) == tmp_path / "tokens" / "texts-two.npy"
    assert np.fromfile(file.path, dtype="<u2").tolist() == expected
    assert np.memmap(file.path, dtype=np.uint16, mode="r", shape=(len(expected),)).tolist() == expected  # as OLMo does
    raw = Path(file.path).read_bytes()
    assert [low + 256 * high for low, high in zip(raw[::2], raw[1::2], strict=True)] == expected
    assert (file.tokens, file.documents, file.text_bytes) == (len(expected), 2, len("The dog ran.The girl."))
    assert open_tokens(file, VOCAB_SIZE).tolist() == expected


def test_source_sizes_are_counted_in_utf8_bytes(tmp_path, tokenizer_file):
    path = write(tmp_path / "accents.txt", "né à 東京\n")
    assert prepare(path, tokenizer_file, tmp_path, EOS).text_bytes == len("né à 東京".encode())


def test_a_foreign_token_file_is_used_unchanged(tmp_path, tokenizer_file):
    ids = [5, 299, 0, EOS, 7]
    np.memmap(tmp_path / "part-0.npy", dtype="<u2", mode="w+", shape=(5,))[:] = ids
    file = prepare(tmp_path / "part-0.npy", tokenizer_file, tmp_path / "tokens", EOS)
    assert open_tokens(file, VOCAB_SIZE).tolist() == ids
    assert (file.tokens, file.text_bytes, file.documents) == (5, None, None)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "0 bytes"), (b"abc", "3 bytes"), (b"ab", "2 bytes")],
    ids=["empty", "odd", "nothing to predict"],
)
def test_broken_token_files_are_refused(tmp_path, tokenizer_file, content, told):
    (tmp_path / "x.npy").write_bytes(content)
    assert told in refused(lambda: prepare(tmp_path / "x.npy", tokenizer_file, tmp_path, EOS), ConfigError)


def test_empty_texts_are_refused(tmp_path, tokenizer_file):
    path = write(tmp_path / "empty.txt", "\n<|endoftext|>\n\n")
    assert "empty.txt" in refused(lambda: prepare(path, tokenizer_file, tmp_path, EOS), ConfigError)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer_file):
    np.array([3, 320, 4], dtype="<u2").tofile(tmp_path / "x.npy")
    file = prepare(tmp_path / "x.npy", tokenizer_file, tmp_path, EOS)
    assert "320" in refused(lambda: open_tokens(file, 320), ConfigError)
    assert open_tokens(file, 321)[1] == 320


def test_ids_of_a_large_file_are_checked_when_they_are_read(tmp_path, monkeypatch):
    """Checking terabytes before training would take hours."""
    monkeypatch.setattr(data, "_PART", 10)
    monkeypatch.setattr(data, "_LOOKED_AT", 100)
    file, ids = data.TokenFile("x", str(tmp_path / "x.npy"), 1000), np.zeros(1000, dtype="<u2")
    ids[5] = 99  # among those checked at the start
    ids.tofile(file.path)
    assert "the id 99" in refused(lambda: open_tokens(file, 99), ConfigError)
    ids[5], ids[505] = 0, 99
    ids.tofile(file.path)
    mixture = Mixture([(open_tokens(file, 99), 1.0)], 10, 1, vocab_size=99)
    message = refused(lambda: [mixture.window(i) for i in range(mixture.windows_per_epoch)], ConfigError)
    assert message == f"{file.path} holds the id 99, beyond the model's vocabulary of 99."


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path, tokenizer_file, monkeypatch):
    path = write(tmp_path / "x.txt", "text")
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 2**16 + 1))
    assert "65537" in refused(lambda: prepare(path, tokenizer_file, tmp_path, EOS), ConfigError)
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 2**16))
    prepare(path, tokenizer_file, tmp_path, EOS)


def test_a_failed_write_is_reported_and_leaves_nothing(tmp_path, tokenizer_file, monkeypatch):
    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = write(tmp_path / "x.txt", "text")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "disk is full" in refused(lambda: prepare(path, tokenizer_file, tmp_path / "tokens", EOS), UserError)
    assert list((tmp_path / "tokens").iterdir()) == []


# ---- the cache ----


@pytest.fixture
def encodings(monkeypatch) -> list[list[str]]:
    """The documents of every call of `encode_batch`, which show whether a file was tokenized again."""
    calls: list[list[str]] = []
    original = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: calls.append(texts) or original(self, texts))
    return calls


def test_an_unchanged_file_is_tokenized_once(tmp_path, tokenizer_file, encodings, monkeypatch):
    path = write(tmp_path / "a" / "x.txt", "The dog.")
    first = prepare(path, tokenizer_file, tmp_path / "tokens", EOS)
    assert prepare(path, tokenizer_file, tmp_path / "tokens", EOS) == first
    assert len(encodings) == 1
    # From another folder, the relative path differs but the file is the same.
    monkeypatch.chdir(tmp_path / "a")
    again = prepare(Path("x.txt"), tokenizer_file, Path("../tokens"), EOS)
    assert Path(again.path).resolve() == Path(first.path)
    assert open_tokens(again, VOCAB_SIZE).tolist() == open_tokens(first, VOCAB_SIZE).tolist()
    assert len(encodings) == 1


def test_changed_text_tokenizer_or_eos_rebuilds_the_cache(tmp_path, tokenizer_file, encodings):
    path, tokenizer = tmp_path / "x.txt", tmp_path / "tokenizer.json"
    tokenizer.write_bytes(tokenizer_file.read_bytes())
    write(path, "The dog.")
    prepare(path, tokenizer, tmp_path, EOS)
    write(path, "The cat.")
    file = prepare(path, tokenizer, tmp_path, EOS)
    assert encodings == [["The dog."], ["The cat."]]
    assert Tokenizer.from_file(tokenizer).decode(open_tokens(file, VOCAB_SIZE)[:-1].tolist()) == "The cat."
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text(encoding="utf-8"))), encoding="utf-8")
    prepare(path, tokenizer, tmp_path, EOS)
    assert len(encodings) == 3
    assert open_tokens(prepare(path, tokenizer, tmp_path, 0), VOCAB_SIZE)[-1] == 0
    assert len(encodings) == 4


@pytest.mark.parametrize("description", ["", "[]", "{}", '{"path": "x"}', None])
def test_a_damaged_cache_is_rebuilt(tmp_path, tokenizer_file, description):
    path = write(tmp_path / "a" / "x.txt", "The dog.")
    file = prepare(path, tokenizer_file, tmp_path, EOS)
    tokens = open_tokens(file, VOCAB_SIZE).tolist()
    if description is None:
        Path(file.path).write_bytes(Path(file.path).read_bytes()[:-2])  # cut short
    else:
        write(tmp_path / "a-x.json", description)
    assert prepare(path, tokenizer_file, tmp_path, EOS) == file
    assert open_tokens(file, VOCAB_SIZE).tolist() == tokens


# ---- names ----


def test_names_are_folder_and_stem_unless_ambiguous(tmp_path):
    names = "en/train/books.txt de/train/books.txt train/code.v2.txt plain.txt train/plain.md train/plain.txt".split()
    paths = [write(tmp_path / name, "x") for name in names]
    found = name_files(paths)
    assert [found[path] for path in paths[:4]] == [
        "en-train-books",
        "de-train-books",
        "train-code.v2",
        f"{tmp_path.name}-plain",
    ]
    assert len(set(found.values())) == len(paths)
    assert not any("/" in name for name in found.values())
    assert name_files(paths[:1])[paths[0]] == "train-books"


def test_a_file_reached_by_two_paths_has_one_name(tmp_path):
    path = write(tmp_path / "a" / "x.txt", "x")
    other = tmp_path / "a" / ".." / "a" / "x.txt"
    assert name_files([path, other, path]) == {path: "a-x", other: "a-x"}


def test_files_of_the_same_name_do_not_overwrite_each_other(tmp_path, tokenizer_file):
    paths = [write(tmp_path / language / "train" / "books.txt", language * 9) for language in ("en", "de")]
    names = name_files(paths)
    files = [prepare(path, tokenizer_file, tmp_path / "tokens", EOS, names[path]) for path in paths]
    decode = Tokenizer.from_file(tokenizer_file).decode
    assert [decode(open_tokens(f, VOCAB_SIZE)[:-1].tolist()) for f in files] == ["en" * 9, "de" * 9]


def test_missing_files_are_refused_before_any_work(tmp_path):
    path = write(tmp_path / "x.txt", "x")
    assert "none.txt" in refused(lambda: name_files([path, tmp_path / "none.txt"]), ConfigError)


# ---- the mixture ----


def sources(*repeats: float, length: int = 203) -> list:
    """Token streams in which every token encodes its source and position."""
    return [(np.arange(length) + 1000 * i, repeat) for i, repeat in enumerate(repeats)]


def epoch(mixture: Mixture, number: int) -> list[tuple[int, int]]:
    """(source, start) of each window of an epoch; a window must be a contiguous part of its source."""
    found = []
    for i in range(mixture.windows_per_epoch):
        window = mixture.window(number * mixture.windows_per_epoch + i)
        assert window.dtype == np.int64
        assert np.array_equal(window, np.arange(window[0], window[0] + 10))
        found.append(divmod(int(window[0]), 1000))
    return found


def test_an_epoch_covers_a_source_without_overlap():
    mixture = Mixture(sources(1.0), 10, seed=1)
    for number in range(20):
        starts = sorted(start for _, start in epoch(mixture, number))
        assert starts == list(range(starts[0], 203 - 9, 10))[: len(starts)]
        assert 0 <= starts[0] < 10
        assert len(starts) == 19


def test_every_token_is_seen_over_the_epochs():
    mixture = Mixture(sources(1.0), 10, seed=1)
    seen = {start + i for number in range(60) for _, start in epoch(mixture, number) for i in range(10)}
    assert seen >= set(range(199))


def test_every_epoch_is_reshuffled_across_sources():
    mixture = Mixture(sources(1.0, 1.0), 10, seed=1)
    first, second = epoch(mixture, 0), epoch(mixture, 1)
    assert first != second
    assert first != sorted(first)
    assert len({start % 10 for number in range(20) for source, start in epoch(mixture, number) if source == 0}) > 3
    assert 5 < [source for source, _ in first[:19]].count(0) < 15  # mixed, not one source after the other


@pytest.mark.parametrize(
    ("repeat", "windows"), [(1.0, 19), (2.0, 38), (0.5, 10), (2.25, 43), (0.05, 1), (3.999, 76), (1.01, 19)]
)
def test_repeats_and_their_fractions_are_honoured(repeat, windows):
    mixture = Mixture(sources(1.0, repeat), 10, seed=1)
    for number in range(2):
        count = Counter(source for source, _ in epoch(mixture, number))
        assert count == {0: 19, 1: windows}


def test_passes_over_a_repeated_source_start_at_different_offsets():
    mixture = Mixture(sources(3.0), 10, seed=1)
    offsets = Counter(start % 10 for _, start in epoch(mixture, 0))
    assert len(offsets) > 1
    assert set(offsets.values()) <= {19, 38, 57}


def test_a_fraction_is_redrawn_every_epoch():
    mixture = Mixture(sources(0.25), 10, seed=1)
    assert len({frozenset(start // 10 for _, start in epoch(mixture, number)) for number in range(6)}) > 1


def test_a_window_depends_on_seed_and_index_alone():
    forwards = Mixture(sources(1.0, 1.5), 10, seed=7)
    n = 3 * forwards.windows_per_epoch
    expected = [forwards.window(i).tolist() for i in range(n)]
    order = np.random.default_rng(0).permutation(n).tolist()
    jumping = Mixture(sources(1.0, 1.5), 10, seed=7)
    found = {i: jumping.window(i).tolist() for i in order}
    assert [found[i] for i in range(n)] == expected
    assert [Mixture(sources(1.0, 1.5), 10, seed=7).window(i).tolist() for i in (n - 1, 0)] == [
        expected[n - 1],
        expected[0],
    ]
    other = Mixture(sources(1.0, 1.5), 10, seed=8)
    assert [other.window(i).tolist() for i in range(n)] != expected


def test_the_order_of_windows_is_pinned():
    """A change here would break resuming every earlier run."""
    mixture = Mixture(sources(1.0, 0.5, length=50), 10, seed=6198)
    assert [int(mixture.window(i)[0]) for i in range(8)] == [1020, 29, 39, 1010, 9, 19, 0, 20]


def test_a_file_too_short_for_two_windows_is_refused_by_name(tmp_path, tokenizer_file):
    np.zeros(19, dtype="<u2").tofile(tmp_path / "short.npy")
    file = prepare(tmp_path / "short.npy", tokenizer_file, tmp_path, EOS)
    short = SourceFiles(Source(path="short.npy"), (tmp_path / "short.npy",))
    loaded = open_sources([short], [[file]], VOCAB_SIZE, 10)
    message = refused(lambda: Mixture(loaded, 10, seed=0), ConfigError)
    assert "short.npy" in message
    assert "19 tokens" in message
    assert "at least 20;" in message  # the windows may start at any of the first ten tokens
    assert "at most 9." in message
    assert Mixture([(np.zeros(20, dtype="<u2"), 1.0)], 10, seed=0).windows_per_epoch == 1


def test_a_repeat_that_leaves_no_window_is_refused():
    message = refused(lambda: Mixture(sources(1.0, 0.01), 10, seed=0), ConfigError)
    assert "passes 0.01 times over" in message
    assert message.endswith("raise its repeat or weight.")  # the message for a weighted source spoke of its repeat


def test_a_fraction_of_several_streams_is_that_of_all_their_windows():
    """Seven windows in streams of one and two: half of them is 3.5, where each by itself would round to nothing."""
    streams = [np.arange(length) + 1000 * i for i, length in enumerate((20, 35, 39, 20, 25))]
    mixture = Mixture([(streams, 2.5)], 10, seed=1)
    assert mixture.windows_per_epoch == 2 * 7 + 4
    taken = Counter()
    for number in range(70):
        found = epoch(mixture, number)
        counts = Counter(stream for stream, _ in found)
        assert all(2 * own <= counts[i] <= 3 * own for i, own in enumerate((1, 2, 2, 1, 1)))
        taken.update(counts)
    assert [taken[i] / 70 for i in range(5)] == pytest.approx([18 / 7 * own for own in (1, 2, 2, 1, 1)], abs=0.2)


def test_whole_passes_over_several_streams_are_those_over_each():
    """Runs from before streams were sources together continue."""
    streams = [np.arange(length) + 1000 * i for i, length in enumerate((50, 35))]
    together = Mixture([(streams, 2.0)], 10, seed=3)
    apart = Mixture([(stream, 2.0) for stream in streams], 10, seed=3)
    assert epoch(together, 1) == epoch(apart, 1)


def test_sources_keep_their_repeats(tmp_path, tokenizer_file):
    for name in ("a", "b"):
        np.zeros(20, dtype="<u2").tofile(tmp_path / f"{name}.npy")
    wanted = (Source(path="a.npy", repeat=2.0), Source(path="b.npy", repeat=0.5))
    found = [SourceFiles(source, (tmp_path / source.path,)) for source in wanted]
    files = [[prepare(tmp_path / s.path, tokenizer_file, tmp_path, EOS)] for s in wanted]
    assert [repeat for _, repeat in open_sources(found, files, VOCAB_SIZE, 10)] == [2.0, 0.5]
