"""The analysis of a model on texts: what it writes, goes on with, and refuses before anything is traced."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest

from olmoe.analysis import analyze as module
from olmoe.analysis import tracing
from olmoe.analysis.analyze import analyze, top_tokens
from olmoe.analysis.measurements import domains_of, measure
from olmoe.analysis.trace import Trace
from olmoe.io.documents import read_documents
from olmoe.tokenizer import Tokenizer
from packed_folders import WHOLE, packed_folder
from sentences import refused

STORIES = "Once upon a time there was a little girl.\n<|endoftext|>\nThe dog ran to the ball, and the girl ran too.\n"
CODE = "def add(a, b):\n    return a + b\n" * 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer_file):
    """A packed model; the same one before packing lies beside it."""
    return packed_folder(tmp_path_factory.mktemp("analyze") / "m", tokenizer_file=tokenizer_file, **WHOLE)


@pytest.fixture(scope="module")
def plain(packed):
    return packed.with_name("m-plain")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "stories.txt").write_text(STORIES * 8, encoding="utf-8")
    (folder / "code.txt").write_text(CODE, encoding="utf-8")
    return {"stories": folder / "stories.txt", "code": folder / "code.txt"}


def test_a_folder_of_trace_and_numbers(plain, texts, tmp_path):
    moves = []
    found = analyze(plain, texts, tmp_path / "out", report=False, progress=lambda *move: moves.append(move))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "trace.safetensors"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(json.dumps(found))
    trace = Trace.open(tmp_path / "out" / "trace.safetensors")
    tokenizer = Tokenizer.from_folder(plain)
    ids = {name: [tokenizer.encode(d) for d in read_documents(path)] for name, path in texts.items()}
    sizes = [sum(map(len, documents)) for documents in ids.values()]
    assert domains_of(trace) == {"stories": slice(0, sizes[0]), "code": slice(sizes[0], sum(sizes))}
    assert trace.input_ids.tolist() == [i for documents in ids.values() for document in documents for i in document]
    starts = np.cumsum([0, *(len(d) for documents in ids.values() for d in documents)])[:-1]
    assert set(starts.tolist()) <= set(trace.starts.tolist())  # a document longer than the context has several windows
    assert {key: value for key, value in found.items() if key != "top_tokens"} == measure(trace)
    assert (found["model"], len(trace.predicted_ids)) == ("m-plain", sum(sizes))
    assert moves[-1] == (sum(sizes), sum(sizes))
    assert moves == sorted(moves)


def test_no_more_tokens_and_no_longer_windows_than_asked_for(plain, texts, tmp_path):
    found = analyze(plain, texts, tmp_path / "out", tokens=50, window=8, report=False)
    assert [numbers["tokens"] for numbers in found["domains"].values()] == [50, 50]
    trace = Trace.open(tmp_path / "out" / "trace.safetensors")
    assert max(np.diff([*trace.starts, len(trace)])) == 8


def test_packed_models_and_what_packing_changed(packed, plain, texts, tmp_path):
    found = analyze(packed, texts, tmp_path / "out", against=plain, report=False)
    assert found["against"]["model"] == "m-plain"
    agreed = found["against"]["domains"]["code"]["top_k"]
    assert len(agreed) == found["layers_count"]
    assert 0.5 < min(agreed) < 1
    assert (tmp_path / "out" / "against.safetensors").is_file()
    same = analyze(plain, texts, tmp_path / "same", against=plain, report=False)
    assert same["against"]["domains"]["stories"] == {k: [1.0] * found["layers_count"] for k in ("top_k", "top_1")}


def test_finished_domains_are_not_traced_again(plain, texts, tmp_path, monkeypatch):
    record, traced = tracing.record, []

    def interrupted(runner, documents, writer, **options):
        traced.append(sum(map(len, documents)))
        for step in record(runner, documents, writer, **options):
            if len(traced) == 2:
                raise KeyboardInterrupt
            yield step

    whole = analyze(plain, texts, tmp_path / "whole", report=False)
    monkeypatch.setattr(tracing, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze(plain, texts, tmp_path / "out", report=False)
    assert [re.fullmatch(r"\.part-\w+\.safetensors", p.name) is not None for p in (tmp_path / "out").iterdir()] == [
        True
    ]
    traced.append(0)
    assert analyze(plain, texts, tmp_path / "out", report=False) == whole
    code = whole["domains"]["code"]["tokens"]
    assert traced == [whole["domains"]["stories"]["tokens"], code, 0, code]
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["metrics.json", "trace.safetensors"]
    trace = (tmp_path / "whole" / "trace.safetensors").read_bytes()
    assert (tmp_path / "out" / "trace.safetensors").read_bytes() == trace


def test_a_run_that_was_killed_goes_on(plain, texts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".part-0a.safetensors", ".trace.safetensors.0a.partial", "..part-0b.safetensors.0a.partial"):
        (out / name).touch()
    (out / "trace.safetensors").touch()  # written, but no numbers after it
    analyze(plain, texts, out, report=False)
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "trace.safetensors"]
    (out / ".part-0a.safetensors").touch()  # beside what a finished run wrote, which is kept
    assert "--overwrite" in refused(lambda: analyze(plain, texts, out, report=False))


def test_a_run_that_was_interrupted_while_drawing_goes_on(plain, texts, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_pictures", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyze(plain, texts, out, report=False)
    monkeypatch.setattr(tracing, "record", None)  # nothing is traced again
    analyze(plain, texts, out, report=False)
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "trace.safetensors"]


def test_other_settings_are_traced_anew(plain, texts, tmp_path, monkeypatch):
    record, windows = tracing.record, []

    def seen(runner, documents, writer, **options):
        windows.append(options["window"])
        yield from record(runner, documents, writer, **options)
        if len(windows) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tracing, "record", seen)
    with pytest.raises(KeyboardInterrupt):
        analyze(plain, texts, tmp_path / "out", window=16, report=False)
    # Whatever was finished, it was with other windows.
    analyze(plain, texts, tmp_path / "out", window=8, report=False)
    assert windows == [16, 8, 8]


def test_nothing_is_left_where_no_domain_was_finished(plain, texts, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(tracing, "record", broken)
    with pytest.raises(KeyboardInterrupt):
        analyze(plain, texts, tmp_path / "out", report=False)
    assert list(tmp_path.iterdir()) == []


def test_an_old_analysis_is_replaced_only_when_asked(plain, packed, texts, tmp_path):
    analyze(plain, texts, tmp_path / "out", against=packed, report=False)
    message = refused(lambda: analyze(plain, texts, tmp_path / "out", report=False))
    assert "exists already" in message
    assert "--overwrite" in message
    analyze(plain, texts, tmp_path / "out", tokens=20, report=False, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "trace.safetensors"]
    (tmp_path / "out" / "thesis.tex").touch()
    assert "thesis.tex" in refused(lambda: analyze(plain, texts, tmp_path / "out", report=False, overwrite=True))


def test_mistakes_are_said_before_anything_is_written(plain, texts, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    out = tmp_path / "out"
    told = [
        refused(lambda: analyze(plain, {"a": tmp_path / "none.txt"}, out, report=False)),
        refused(lambda: analyze(plain, {"a": tmp_path / "empty.txt"}, out, report=False)),
        refused(lambda: analyze(plain, {}, out, report=False)),
        refused(lambda: analyze(plain, {" ": texts["code"]}, out, report=False)),
        refused(lambda: analyze(plain, texts, out, tokens=0, report=False)),
        refused(lambda: analyze(plain, texts, out, window=0, report=False)),
        refused(lambda: analyze(plain, texts, out, backend="gpu", report=False)),
        refused(lambda: analyze(plain, texts, out, dtype="float7", report=False)),
        refused(lambda: analyze(plain, texts, tmp_path / "empty.txt", report=False)),
        refused(lambda: analyze(tmp_path / "no-model", texts, out, report=False)),
    ]
    wanted = ("does not exist", "is empty", "at least one", "domain is empty", "tokens", "window", "gpu", "float7",
              "is a file", "no-model")  # fmt: skip
    assert [want for want, message in zip(wanted, told, strict=True) if want not in message] == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "olmoe[analysis]" in refused(lambda: analyze(plain, texts, out))
    assert not out.exists()


def test_models_that_cannot_be_compared(plain, texts, tmp_path, tokenizer_file):
    from packed_folders import plain_folder

    fewer = plain_folder(tmp_path / "fewer", tokenizer_file, num_hidden_layers=1)
    assert "num_hidden_layers 1" in refused(lambda: analyze(plain, texts, tmp_path / "o", against=fewer, report=False))


def test_tokens_of_experts(plain, texts, tmp_path):
    analyze(plain, texts, tmp_path / "out", report=False)
    trace, tokenizer = Trace.open(tmp_path / "out" / "trace.safetensors"), Tokenizer.from_folder(plain)
    found = top_tokens(trace, tokenizer, layer=1)
    assert found["layer"] == 1
    assert found["experts"]
    for expert, listed in found["experts"].items():
        shares = [share for _, share, _ in listed]
        assert shares == sorted(shares, reverse=True)
        assert len(listed) <= 15
        for text, share, number in listed:
            at = [i for i, each in enumerate(trace.input_ids.tolist()) if tokenizer.decode([each]) == text]
            assert number == len(at) >= 10
            assert share == pytest.approx(np.mean(trace.expert_ids[at, 1, 0] == int(expert)))
