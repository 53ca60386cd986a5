"""Trained vocabularies keep OLMoE's conventions for ids at any size."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from tokenizers import Tokenizer as RawTokenizer

from conftest import TEXT
from olmoe.errors import ConfigError, UserError
from olmoe.tokenizer import Tokenizer
from olmoe.train import vocabulary
from olmoe.train.vocabulary import FIRST, LAST, SPACES, train_vocabulary

SMALLEST = 256 + 28


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Documents with enough distinct words for a few hundred merges."""
    rng = random.Random(0)
    return [" ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)) for _ in range(20)]


@pytest.mark.parametrize("size", [SMALLEST, SMALLEST + 1, 400, 512])
def test_ids_follow_the_released_tokenizer_at_any_size(tmp_path, words, olmoe_tokenizer_file, size):
    path = tmp_path / "tokenizer.json"
    train_vocabulary(words, size, path)
    ours, released = RawTokenizer.from_file(str(path)), RawTokenizer.from_file(str(olmoe_tokenizer_file))
    assert ours.get_vocab_size() == size
    assert sorted(ours.get_vocab().values()) == list(range(size))
    # Counted from either end, added tokens and their flags match the released vocabulary.
    ours_added, released_added = ours.get_added_tokens_decoder(), released.get_added_tokens_decoder()
    assert {i if i < 2 else i - size for i in ours_added} == {i if i < 2 else i - 50280 for i in released_added}
    for i, token in released_added.items():
        mine = ours_added[i if i < 2 else i - 50280 + size]
        assert (mine.content, mine.special) == (token.content, token.special)
    assert len(FIRST) + len(SPACES) + len(LAST) == len(ours_added) == 28


def test_encoding_behaves_like_the_released_tokenizer(tokenizer_file, olmoe_tokenizer_file):
    mine, released = (json.loads(p.read_text(encoding="utf-8")) for p in (tokenizer_file, olmoe_tokenizer_file))
    for part in ("normalizer", "pre_tokenizer", "truncation", "padding"):
        assert mine[part] == released[part]
    tokenizer = Tokenizer.from_file(tokenizer_file)
    size = tokenizer.vocab_size
    assert tokenizer.encode("<|endoftext|>") == [size - 1]
    assert tokenizer.encode("<|padding|>|||IP_ADDRESS|||") == [1, 0]
    assert tokenizer.encode(" " * 26) == [size - 26, size - 4]  # 24 spaces, then 2
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")  # NFC
    assert len(tokenizer.encode("Once upon a time")) < len("Once upon a time")  # merges were learnt


def test_unseen_characters_survive_a_round_trip(tokenizer):
    text = "Ünseen: 日本語 😀 \x00\t\r\n    tail  "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_takes_any_iterable(tmp_path, words):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    train_vocabulary(words, 400, paths[0])
    train_vocabulary((word for word in words), 400, paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"^A byte-level vocabulary needs at least {SMALLEST} entries, not 283.$"):
        train_vocabulary([TEXT], SMALLEST - 1, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_for_the_size_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match=r"^The text yields only \d+ vocabulary entries, not 5000; give more text"):
        train_vocabulary(["a few words only"], 5000, tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="yields only 284 vocabulary entries"):
        train_vocabulary([], 300, tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_and_an_unwritable_path_is_reported_in_one_sentence(tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    train_vocabulary([TEXT], SMALLEST, path)
    train_vocabulary([TEXT], SMALLEST + 1, path)
    assert Tokenizer.from_file(path).vocab_size == SMALLEST + 1
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    with pytest.raises(UserError, match="cannot be written"):
        train_vocabulary([TEXT], SMALLEST, path / "below-a-file" / "tokenizer.json")


# ---- long inputs ----


@pytest.mark.parametrize("kind", ["letters", "digits", "signs", "one letter", "spaces", "marks"])
def test_a_long_run_takes_linear_time(tmp_path, kind):
    alphabet = {
        "letters": "abcdefghijklmnopqrstuvwxyz", "digits": "0123456789", "signs": "-_=+*#", "one letter": "a",
        "spaces": " \t\n", "marks": "\u0301\u0300_-",
    }[kind]  # fmt: skip
    run = "".join(random.Random(0).choices(alphabet, k=200_000))
    started = time.perf_counter()
    with contextlib.suppress(ConfigError):  # too few merges in some
        train_vocabulary([run], 400, tmp_path / "tokenizer.json")
    assert time.perf_counter() - started < 15  # uncut, 160,000 letters took 25 s, and 2 million never ended


def test_only_overlong_words_are_cut_and_nothing_is_lost():
    word = "x" * vocabulary.LONGEST
    for text in ("", "one two", word, f"a {word} b", f"{word} {word}", word + "-" + word):
        assert list(vocabulary._cut(text)) == [text]
    for text in (word + "x", f"a {word}{word}xx b {word}x\n", " " * (3 * vocabulary.LONGEST + 1)):
        parts = list(vocabulary._cut(text))
        assert len(parts) > 1
        assert "".join(parts) == text
        assert max(len(run) for part in parts for run in re.findall(r"x+| +", part)) <= vocabulary.LONGEST


def test_errors_while_reading_documents_propagate(tmp_path):
    def broken():
        yield "text"
        raise ConfigError("The data file x is gone.")

    with pytest.raises(ConfigError, match="^The data file x is gone.$"):
        train_vocabulary(broken(), 300, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_ctrl_c_interrupts_training(tmp_path):
    code = """
import random, sys
from olmoe.train import vocabulary
vocabulary.LONGEST, vocabulary._LONG_RUN = 10**9, vocabulary.re.compile(r"(?!)")
text = "".join(random.Random(0).choices("abcdefghij", k=2_000_000))
print("started", flush=True)
vocabulary.train_vocabulary([text], 400, sys.argv[1])
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert not (tmp_path / "tokenizer.json").exists()
