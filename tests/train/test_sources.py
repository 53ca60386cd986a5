"""Folders, patterns, JSONL and chats as training sources."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from configurations import VOCAB_SIZE
from olmoe.errors import ConfigError, UserError
from olmoe.tokenizer import Tokenizer
from olmoe.train.config import load_config
from olmoe.train.data import Mixture, open_tokens, prepare
from olmoe.train.loop import train
from olmoe.train.run_data import open_data
from olmoe.train.sources import find_files, names_of, open_sources
from olmoe.train.state import check_continues
from sentences import refused
from training_runs import WORDS, read_metrics, text, write_run

EOS = VOCAB_SIZE - 1


def found(config) -> list[list[str]]:
    base = config.base
    return [[str(p.relative_to(base)) for p in f.paths] for f in find_files(config)["train"]]


@pytest.fixture
def config(tmp_path, tokenizer_file):
    def make(*paths: str, **options):
        data = {"train": [{"path": path} | options for path in paths]}
        return load_config(write_run(tmp_path, tokenizer_file, data=data))

    for name in ("a/2.txt", "a/10.jsonl", "a/deep/1.txt", "a/.hidden.txt", "a/.git/x.txt", "a/3.npy", "b[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return make


def test_a_folder_or_pattern_gives_its_files_in_order(config):
    assert found(config("a")) == found(config("a/")) == [["a/10.jsonl", "a/2.txt", "a/3.npy", "a/deep/1.txt"]]
    assert found(config("a/*.txt", "a/**/*.txt")) == [["a/2.txt"], ["a/2.txt", "a/deep/1.txt"]]
    assert found(config("a/?.*")) == [["a/2.txt", "a/3.npy"]]
    assert found(config("b[1].txt")) == [["b[1].txt"]]  # an existing file is taken literally
    assert found(config("a", dtype="uint32")) == [["a/3.npy"]]


def test_other_files_in_a_folder_are_named(config, tmp_path, caplog):
    (tmp_path / "a" / "notes.md").touch()
    assert found(config("a")) == [["a/10.jsonl", "a/2.txt", "a/3.npy", "a/deep/1.txt"]]
    assert "1 files such as notes.md are not read" in caplog.text
    for name in ("empty", "packed"):
        (tmp_path / name).mkdir()
    (tmp_path / "packed" / "x.txt.gz").touch()
    assert "holds no file" in refused(lambda: found(config("empty")), ConfigError)
    assert "x.txt.gz" in refused(lambda: found(config("packed")), ConfigError)
    assert "matches none" in refused(lambda: found(config("a/*.csv")), ConfigError)
    assert "none.txt" in refused(lambda: names_of(find_files(config("none.txt")), []), ConfigError)


def test_token_files_cached_in_a_folder_are_not_read_as_sources(config, tmp_path, tokenizer_file):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.txt").write_text("The girl saw a red ball.", encoding="utf-8")
    prepare(tmp_path / "c" / "x.txt", tokenizer_file, tmp_path / "c", EOS)
    assert (tmp_path / "c" / "c-x.npy").exists()
    assert found(config("c")) == [["c/x.txt"]]


def test_recorded_names_stay_with_their_files(config, tmp_path):
    groups = find_files(config("a"))
    names = names_of(groups, [])
    assert list(names.values())[:2] == ["a-10", "a-2"]
    again = list(names_of(groups, ["x-10", "x-2", "x-3", "deep-1", "x-valid"]).values())
    assert again == ["x-10", "x-2", "x-3", "deep-1", "x-valid"]
    assert list(names_of(groups, ["x-10"]).values()) == ["x-10", *list(names.values())[1:]]
    assert names_of(groups, ["a-2"]) == names  # two files must not get the same name


def test_short_files_of_one_source_are_joined(config, tmp_path, tokenizer_file):
    lengths = {"d/1.npy": 15, "d/2.npy": 40, "d/3.npy": 7, "d/4.npy": 3}
    (tmp_path / "d").mkdir()
    for i, (name, length) in enumerate(lengths.items()):
        np.full(length, i + 1, "<u2").tofile(tmp_path / name)
    files = find_files(config("d"))["train"]
    tokens = [[prepare(p, tokenizer_file, tmp_path, EOS) for p in files[0].paths]]

    def streams(length):
        ((opened, _),) = open_sources(files, tokens, VOCAB_SIZE, length)
        return [list(stream) for stream in opened]

    assert streams(10) == [[2] * 40, [1] * 15 + [3] * 7 + [4] * 3]
    assert streams(15) == [[1] * 15 + [3] * 7 + [4] * 3 + [2] * 40]  # the short ones by themselves are still too short
    assert streams(1) == [[1] * 15, [2] * 40, [3] * 7, [4] * 3]
    message = refused(lambda: streams(33), ConfigError)
    assert "65 tokens" in message
    assert "at least 66" in message
    assert "at most 32." in message


def test_weights_are_shares_of_windows_regardless_of_size(tmp_path, tokenizer_file):
    """Three shards in a folder against one larger file, weighted 3 to 1; every window occurs in its files."""
    generator = np.random.default_rng(1)
    (tmp_path / "web").mkdir()
    for number, length in enumerate((900, 1500, 600)):
        generator.integers(0, 100, length).astype("<u2").tofile(tmp_path / "web" / f"part-{number}.npy")
    generator.integers(100, 200, 9000).astype("<u2").tofile(tmp_path / "code.npy")
    weighted = [{"path": "web/*.npy", "weight": 0.75}, {"path": "code.npy", "weight": 0.25}]
    config = load_config(write_run(tmp_path, tokenizer_file, data={"train": weighted}))
    files = find_files(config)["train"]
    tokens = [[prepare(p, tokenizer_file, tmp_path, EOS) for p in each.paths] for each in files]
    streams = open_sources(files, tokens, VOCAB_SIZE, 10)
    assert [sum(map(len, group)) for group, _ in streams] == [3000, 9000]
    mixture = Mixture(streams, 10, seed=1)
    assert mixture.windows_per_epoch == pytest.approx(1200, rel=0.01)
    for epoch in range(2):
        start = epoch * mixture.windows_per_epoch
        drawn = [mixture.window(start + i) for i in range(mixture.windows_per_epoch)]
        assert np.mean([window.max() < 100 for window in drawn]) == pytest.approx(0.75, abs=0.005)
    windows = {"web": 89 + 149 + 59, "code": 899}  # so many, wherever a pass starts
    assert streams[0][1] == pytest.approx(0.75 * sum(windows.values()) / windows["web"])  # of all shards of a source


@pytest.mark.parametrize("sizes", [[29] * 60, [20] * 60, list(range(20, 90))], ids=["29", "20", "20-89"])
@pytest.mark.parametrize("weight", [0.5, 0.03])
def test_shares_of_windows_hold_for_many_short_files(tmp_path, tokenizer_file, sizes, weight):
    """A file of 29 tokens has but one window of 10 at any start, and 0.03 of the epoch is less than one of each."""
    generator = np.random.default_rng(1)
    (tmp_path / "short").mkdir()
    for number, length in enumerate(sizes):
        np.full(length, number).astype("<u2").tofile(tmp_path / "short" / f"{number:02}.npy")
    generator.integers(100, 200, 9000).astype("<u2").tofile(tmp_path / "long.npy")
    weighted = [{"path": "short", "weight": weight}, {"path": "long.npy", "weight": 1 - weight}]
    config = load_config(write_run(tmp_path, tokenizer_file, data={"train": weighted}))
    files = find_files(config)["train"]
    tokens = [[prepare(p, tokenizer_file, tmp_path, EOS) for p in each.paths] for each in files]
    mixture = Mixture(open_sources(files, tokens, VOCAB_SIZE, 10), 10, seed=1)
    epochs, size = 40, mixture.windows_per_epoch
    drawn = [mixture.window(i) for i in range(epochs * size)]
    found = Counter(int(window[0]) for window in drawn if window.max() < 100)
    assert sum(found.values()) / len(drawn) == pytest.approx(weight, abs=0.5 / size + 1e-9)
    # Over the epochs every file gets its part, within five deviations of independent draws.
    windows = [(length - 10) // 10 for length in sizes]
    for number, own in enumerate(windows):
        expected = weight * len(drawn) * own / sum(windows)
        assert abs(found[number] - expected) <= 5 * expected**0.5 + 1, number
    again = Mixture(open_sources(files, tokens, VOCAB_SIZE, 10), 10, seed=1)
    assert [again.window(i).tolist() for i in (3 * size, 7)] == [drawn[3 * size].tolist(), drawn[7].tolist()]


def test_runs_whose_windows_would_now_be_others_are_told_apart(tmp_path, tokenizer_file):
    """Where shares are drawn otherwise than before, an older run must not silently go on; all others must."""
    for name in ("a", "b", "c/1", "c/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.zeros(100, "<u2").tofile(tmp_path / f"{name}.npy")

    def fingerprint(*sources):
        return open_data(load_config(write_run(tmp_path, tokenizer_file, data={"train": [*sources]})), [])[
            1
        ].fingerprint()

    same = fingerprint({"path": "a.npy"}, {"path": "b.npy", "repeat": 0.5}, {"path": "c", "repeat": 2.0})
    assert "drawing" not in same
    for other in ({"path": "a.npy", "weight": 1.0},), ({"path": "c", "repeat": 0.5},):
        now = fingerprint(*other)
        assert now["drawing"] == 2
        before = {key: value for key, value in now.items() if key != "drawing"}
        check_continues(tmp_path, now, now)
        message = refused(lambda was=before, now=now: check_continues(tmp_path, was, now), ConfigError)
        assert message.startswith("How windows are drawn from sources with a weight")


def test_there_may_be_more_shards_than_open_files_allowed(tmp_path):
    """The limit is raised as far as the system allows; beyond that there is a one-sentence error."""
    for number in range(300):
        np.arange(20, dtype="<u2").tofile(tmp_path / f"{number:03}.npy")
    program = (
        "import resource, sys; from pathlib import Path; from olmoe import runtime\n"
        "from olmoe.errors import ConfigError; from olmoe.train.data import TokenFile, open_tokens\n"
        "runtime._OTHER_FILES = 100; resource.setrlimit(resource.RLIMIT_NOFILE, (200, int(sys.argv[2])))\n"
        "paths = sorted(Path(sys.argv[1]).glob('*.npy')); runtime.allow_open_files(len(paths))\n"
        "try: opened = [open_tokens(TokenFile(p.stem, str(p), 20), 64) for p in paths]; print(len(opened))\n"
        "except ConfigError as error: print(error)\n"
    )
    for limit, answer in ((1000, r"300\n"), (250, r"The token file .* no more open files; raise that limit .*\n")):
        command = [sys.executable, "-c", program, str(tmp_path), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.fullmatch(answer, done.stdout), done.stdout


def test_a_run_on_a_folder_equals_one_on_a_file_of_its_documents(tmp_path, tokenizer_file):
    documents = [line for line in text(24).split("\n") if line and line != "<|endoftext|>"]
    losses = {}
    for kind, path in {"file": "train.txt", "folder": "many", "lines": "train.jsonl"}.items():
        data = {"train": [{"path": path}], "sequence_length": 32}  # no document is long enough for two windows
        toml = write_run(tmp_path / kind, tokenizer_file, data=data, schedule={"total_tokens": 512})
        (tmp_path / kind / "many").mkdir()
        for i, document in enumerate(documents):
            (tmp_path / kind / "many" / f"{i:03}.txt").write_text(document, encoding="utf-8")
        (tmp_path / kind / "train.txt").write_text("\n<|endoftext|> \n".join(documents), encoding="utf-8-sig")
        lines = "".join(json.dumps({"text": document, "id": 1}) + "\n" for document in documents)
        (tmp_path / kind / "train.jsonl").write_text(lines, encoding="utf-8-sig")
        train(load_config(toml), show_progress=False)
        losses[kind] = [r.get("cross_entropy") for r in read_metrics(tmp_path / kind / "out")]
    assert losses["file"] == losses["folder"] == losses["lines"]


def test_chats_use_the_tokenizers_template(tmp_path, tokenizer_file):
    chat = [{"role": "user", "content": "the girl"}, {"role": "assistant", "content": "saw a red ball"}]
    rows = [{"messages": chat}, {"text": "the dog ran"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = Tokenizer.from_file(tokenizer_file, eos_ids=(EOS,))
    file = prepare(tmp_path / "x.jsonl", tokenizer_file, tmp_path / "tokens", EOS)
    rendered = tokenizer.render_chat(chat, add_generation_prompt=False)
    expected = [*tokenizer.encode_chat(chat, add_generation_prompt=False), EOS, *tokenizer.encode("the dog ran"), EOS]
    assert open_tokens(file, VOCAB_SIZE).tolist() == expected
    assert (file.documents, file.text_bytes) == (2, len(rendered) + len("the dog ran"))
    # Another template beside the tokenizer gives the same file other tokens.
    (tmp_path / "t").mkdir()
    copy = tmp_path / "t" / "tokenizer.json"
    copy.write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    file = prepare(tmp_path / "x.jsonl", copy, tmp_path / "tokens", EOS)
    expected = [*tokenizer.encode("the girl"), EOS, *tokenizer.encode("the dog ran"), EOS]
    assert open_tokens(file, VOCAB_SIZE).tolist() == expected


def test_a_chat_refused_by_the_template_is_reported_in_one_sentence(tmp_path, tokenizer_file):
    (tmp_path / "x.jsonl").write_text('{"messages": [{"content": "no role"}]}', encoding="utf-8")
    refused(lambda: prepare(tmp_path / "x.jsonl", tokenizer_file, tmp_path, EOS), UserError)


def test_a_vocabulary_is_trained_on_the_texts_of_json_lines(tmp_path):
    (tmp_path / "t").mkdir()
    path = write_run(
        tmp_path, "new/tokenizer.json", tokenizer={"vocab_size": 300}, model={"vocab_size": 300, "eos_token_id": None},
        data={"train": [{"path": "t"}], "valid": None}, schedule={"total_tokens": 64, "warmup_tokens": 0},
    )  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": " ".join(WORDS)}]}] * 9 + [{"text": " ".join(WORDS)}] * 9
    (tmp_path / "t" / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train(load_config(path), show_progress=False)
    tokenizer = Tokenizer.from_folder(tmp_path / "out" / "best")
    assert len(tokenizer.encode(" the")) == 1
    assert len(tokenizer.encode("messages")) > 2  # JSON's syntax and keys were not trained on
