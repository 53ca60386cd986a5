"""`olmoe analyze`: texts by name go in, a folder comes out; mistakes are one sentence and leave nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from olmoe.analysis.trace import Trace
from olmoe.cli.main import main
from packed_folders import WHOLE, plain_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_file):
    return plain_folder(tmp_path_factory.mktemp("analyze") / "model", tokenizer_file, **WHOLE)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("Once upon a time there was a little girl.\n" * 5, encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({"text": "The dog ran to the ball."}) + "\n", encoding="utf-8")
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["analyze", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_all_that_it_writes(capsys, model, texts, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")
    code, out, err = run(
        capsys, model, "--text", f"stories={texts}/a.txt", f"dogs={texts}/b.jsonl", "--output", tmp_path / "out",
        "--against", model, "--window", 16, "--figures",
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert (code, err) == (0, "")
    assert {"trace.safetensors", "against.safetensors", "metrics.json", "report.html"} < names
    assert {"figure-load.png", "figure-load.svg", "figure-agreement.svg"} < names
    assert not [name for name in names if name.startswith(".")]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    first, second = out.splitlines()
    a, b = (found["domains"][name]["tokens"] for name in ("stories", "dogs"))
    assert first == f"{a + b:,} tokens of model traced: stories {a}, dogs {b}"
    assert second == str(tmp_path / "out" / "report.html")
    assert len(Trace.open(tmp_path / "out" / "trace.safetensors")) == a + b


def test_texts_may_be_named_one_by_one_and_nothing_is_said(capsys, model, texts, tmp_path):
    code, out, err = run(
        capsys, model, "--text", f"x={texts}/a.txt", "--text", f"y={texts}/b.jsonl", "--output", tmp_path / "out",
        "--tokens", 3, "--no-report", "--quiet",
    )  # fmt: skip
    assert (code, out, err) == (0, "", "")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert {name: numbers["tokens"] for name, numbers in found["domains"].items()} == {"x": 3, "y": 3}
    assert not (tmp_path / "out" / "report.html").exists()


def test_earlier_checkpoints(capsys, model, texts, tmp_path):
    for name in ("step2", "step1"):
        shutil.copytree(model, tmp_path / "run" / name)
    code, out, err = run(
        capsys, model, "--text", f"x={texts}/a.txt", "--revisions", tmp_path / "run" / "step2", "--revisions",
        tmp_path / "run" / "step1", "--device", "cpu", "--output", tmp_path / "out", "--no-report",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 revisions: step1, step2\n" in out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert {layer["saturation_k"] for each in found["revisions"] for layer in each["layers"].values()} == {1.0}
    _, out, _ = run(
        capsys, model, "--text", f"x={texts}/a.txt", "--revisions", tmp_path / "run" / "step1", "--device", "cpu",
        "--output", tmp_path / "one", "--no-report",
    )  # fmt: skip
    assert "1 revision: step1\n" in out


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["a.txt"], "NAME=FILE"),
        (["=a.txt"], "NAME=FILE"),
        (["a="], "NAME=FILE"),
        (["a={}/a.txt", "a={}/b.jsonl"], "twice"),
        (["a={}/none.txt"], "does not exist"),
        (["a={}/a.txt", "--tokens", "0"], "tokens must be at least 1"),
        (["a={}/a.txt", "--against", "{}"], "config.json"),
        (["a={}/a.txt", "--revisions", "step5000"], "has no revisions"),
        (["a={}/a.txt", "--revisions", "{}"], "neither a config.json"),
        (["a={}/a.txt", "--device", "gpu"], "Unknown device 'gpu'"),
    ],
)
def test_mistakes(capsys, model, texts, tmp_path, given, wanted):
    arguments = [each.format(texts) for each in given]
    code, out, err = run(capsys, model, "--text", *arguments, "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert wanted in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(capsys, model, texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}", encoding="utf-8")
    arguments = (model, "--text", f"a={texts}/a.txt", "--output", tmp_path / "out", "--no-report")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "--overwrite" in err
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["model"] == "model"
