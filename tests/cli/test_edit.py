"""`olmoe edit`: what it writes and prints, in which order edits apply, and one sentence for every mistake."""

from __future__ import annotations

import json

import pytest

from conftest import TEXT
from olmoe.cli.main import main
from olmoe.weights import checkpoint
from packed_folders import WHOLE, packed_folder, plain_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_file):
    return plain_folder(tmp_path_factory.mktemp("edit") / "model", tokenizer_file, **WHOLE)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({"text": "The dog ran to the ball. " * 20}) + "\n", encoding="utf-8")
    (folder / "lists.json").write_text('{"0": [1, 2], "1": [3, 4]}')
    (folder / "order.json").write_text("[7, 6, 5, 4, 3, 2, 1, 0]")
    (folder / "policy.json").write_text('{"k": 2}')
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["edit", *map(str, arguments)])
    return code, *capsys.readouterr()


def plan_of(folder):
    return json.loads((folder / "olmoe_edit.json").read_text())


def test_pruning_by_default(capsys, model, tmp_path):
    out = tmp_path / "out"
    code, said, err = run(capsys, model, out, "--prune", 2)
    size = (out / "model.safetensors").stat().st_size
    assert (code, err) == (0, "")
    assert said == f"{out}: 2 layers of 6 experts, 3 a token; {size:,} bytes of weights\n"
    assert checkpoint.load(out).config.num_experts == 6
    assert plan_of(out)["edits"] == {"prune": 2, "by": "reap"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--prune", 2, "--by", "load", "--calibration", "{}/a.txt", "{}/b.jsonl"], {"prune": 2, "by": "load"}),
        (["--prune", 2, "--by", "random", "--seed", 3], {"prune": 2, "by": "random", "seed": 3}),
        (["--prune", "{}/lists.json"], {"prune": {"0": [1, 2], "1": [3, 4]}}),
        (["--merge", 2, "--calibration", "none"], {"merge": 2}),
        (["--reorder", "load", "--calibration-tokens", 100], {"reorder": "load"}),
        (["--reorder", "{}/order.json"], {"reorder": [7, 6, 5, 4, 3, 2, 1, 0]}),
        (["--layers", "0-1,0"], {"layers": [0, 1, 0]}),
        (["--duplicate-layers", "0,1"], {"duplicate_layers": [0, 1]}),
        (["--top-k", 1, "--normalize-top-k"], {"top_k": 1, "normalize_top_k": True}),
        (["--no-normalize-top-k"], {"normalize_top_k": False}),
    ],
    ids=str,
)
def test_every_edit(capsys, model, texts, tmp_path, given, wanted):
    code, _, err = run(capsys, model, tmp_path / "out", *(str(each).format(texts) for each in given))
    assert (code, err) == (0, "")
    assert plan_of(tmp_path / "out")["edits"] == wanted


def test_all_at_once_and_a_report(capsys, model, texts, tmp_path):
    out = tmp_path / "out"
    code, said, err = run(
        capsys, model, out, "--top-k", 2, "--duplicate-layers", 1, "--reorder", "load", "--merge", 1, "--prune", 2,
        "--report", "--text", f"stories={texts}/a.txt", f"{texts}/b.jsonl", "--tokens", 100, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert lines[0].startswith(f"{out}: 3 layers of 5 experts, 2 a token;")
    found = json.loads(lines[-1])
    assert list(found["texts"]) == ["stories", "b"]
    assert found["models"]["edited"]["experts"] == 5
    assert "| bytes a token reads |" in said
    # The same report of what is there already.
    code, said, err = run(
        capsys, model, out, "--report", "--text", f"stories={texts}/a.txt", f"{texts}/b.jsonl", "--tokens", 100,
        "--no-speed", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["texts"] == found["texts"]
    assert said.splitlines()[-1].startswith("| b |")


def test_a_policy_is_measured_and_nothing_is_written(capsys, model, texts, tmp_path):
    code, said, err = run(capsys, model, "--policy", texts / "policy.json", "--tokens", 60, "--no-speed")
    assert (code, err) == (0, "")
    found = json.loads(said.splitlines()[-1])
    assert found["policy"] == "policy.json"
    assert (found["models"]["original"]["top_k"], found["models"]["edited"]["top_k"]) == (3, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_stays_packed(capsys, tmp_path, tokenizer_file):
    packed = packed_folder(tmp_path / "packed", "int8", tokenizer_file, **WHOLE)
    code, _, err = run(capsys, packed, tmp_path / "out", "--prune", 2, "--merge", 1)
    assert (code, err) == (0, "")
    assert checkpoint.Checkpoint.open(tmp_path / "out").format == "int8"


def test_replacing(capsys, model, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, model, out, "--top-k", 2)[0] == 0
    assert run(capsys, model, out, "--top-k", 1)[0] == 2
    assert run(capsys, model, out, "--top-k", 1, "--overwrite")[0] == 0
    assert checkpoint.load(out).config.num_experts_per_tok == 1


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["OUT"], "Give an edit"),
        ([], "Give OUT"),
        (["--prune", "2"], "Give OUT"),
        (["OUT", "--prune", "8"], "must be from 0 to 7"),
        (["OUT", "--prune", "-1"], "must be from 0 to 7"),
        (["OUT", "--prune", "6"], "--top-k from 1 to 2"),
        (["OUT", "--prune", "none.json"], "cannot be read"),
        (["OUT", "--prune", "{}/a.txt"], "does not hold lists"),
        (["OUT", "--prune", "{}/lists.json", "--by", "load"], "give a number N"),
        (["OUT", "--by", "load"], "give a number N"),
        (["OUT", "--merge", "9"], "merge must be from 0 to 7"),
        (["OUT", "--reorder", "{}/lists.json"], "names 2 experts, but the layer has 8"),
        (["OUT", "--layers", "0-2"], "no layer 2"),
        (["OUT", "--layers", "2-0"], "numbers of layers"),
        (["OUT", "--layers", "a"], "numbers of layers"),
        (["OUT", "--duplicate-layers", "5"], "no layer 5"),
        (["OUT", "--duplicate-layers", "1,,2"], "numbers of layers"),
        (["OUT", "--layers", "0-99999999999999999999"], "numbers of layers"),
        (["OUT", "--top-k", "0"], "choose 0 experts"),
        (["OUT", "--prune", "2", "--calibration", "none"], "no"),
        (["OUT", "--prune", "2", "--calibration", "none.txt"], "does not exist"),
        (["OUT", "--prune", "2", "--calibration-tokens", "0"], "at least 1"),
        (["OUT", "--prune", "2", "--text", "{}/a.txt"], "add it"),
        (["OUT", "--prune", "2", "--json", "x.json"], "add --report"),
        (["OUT", "--top-k", "2", "--report", "--json", "{}/a.txt/x.json"], "not a writable folder"),
        (["OUT", "--top-k", "2", "--report", "--text", "=x"], "NAME=FILE"),
        (["OUT", "--top-k", "2", "--report", "--text", "{}/a.txt", "a={}/b.jsonl"], "twice"),
        (["OUT", "--report"], "no folder 'OUT'"),
        (["OUT", "--top-k", "2", "--report", "--text", "none.txt"], "does not exist"),
        (["OUT", "--policy", "{}/policy.json"], "leave OUT and the edits out"),
        (["--top-k", "2", "--policy", "{}/policy.json"], "leave OUT and the edits out"),
        (["--policy", "{}/lists.json"], "router policy"),
    ],
    ids=str,
)
def test_mistakes(capsys, model, texts, tmp_path, monkeypatch, given, wanted):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, model, *(each.format(texts) for each in given))
    assert (code, out) == (2, ""), err
    assert wanted in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
