"""`olmoe quantize`: packs, tells the bytes, reports quality, and says what is wrong in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest

from olmoe.cli import quantize
from olmoe.cli.main import main
from olmoe.weights import packed_file
from olmoe.weights.recipes import BASE_RECIPES, RECIPES
from packed_folders import WHOLE, plain_folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer_file):
    return plain_folder(tmp_path_factory.mktemp("quantize") / "plain", tokenizer_file, **WHOLE)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a little girl.\n<|endoftext|>\nThe dog ran to the ball.\n" * 6)
    return path


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["quantize", *map(str, arguments), "--quiet"])
    return code, *capsys.readouterr()


def test_calibration_takes_json_lines_and_chats_in_the_models_own_template(plain, tmp_path, capsys):
    words = "One day a girl went to the park. " * 8
    source = shutil.copytree(plain, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    (tmp_path / "x.txt").write_text(words, encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words}), encoding="utf-8")
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": words.strip()}]}), encoding="utf-8"
    )
    for name in ("x.txt", "text.jsonl", "chat.jsonl"):
        target = tmp_path / f"from {name}"
        assert run(capsys, source, target, "--format", "int4", "--calibration", tmp_path / name)[0] == 0
    first, *others = [
        (tmp_path / f"from {n}/model.safetensors").read_bytes() for n in ("x.txt", "text.jsonl", "chat.jsonl")
    ]
    assert others == [first, first]


@pytest.mark.parametrize("format", ["int8", "int4", "int4-high", "q4_0"])
def test_packs_reports_bytes_and_quality(capsys, plain, tmp_path, text, format):
    code, out, err = run(
        capsys, plain, tmp_path / "m", "--format", format, "--report", "--text", text, "--calibration", text
    )
    assert (code, err) == (0, "")
    assert packed_file.PackedFile(tmp_path / "m").layout.recipe == format
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    for kind in ("embeddings", "attention", "experts, down", "routers", "output head", "norms and biases"):
        assert f"| {kind} |" in out
    values = json.loads(out.splitlines()[-1])
    assert values["target"] == str(tmp_path / "m")
    assert 0 < values["kl_mean"] < 0.5
    assert len(values["routing_agreement"]) == 2


def test_reports_on_a_folder_that_is_packed_already(capsys, plain, tmp_path, text):
    assert run(capsys, plain, tmp_path / "m", "--format", "int4", "--calibration", "none")[0] == 0
    before = (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns
    code, out, err = run(capsys, plain, tmp_path / "m", "--report", "--text", text, "--tokens", 20)
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["tokens"] == 19
    assert (tmp_path / "m" / "model.safetensors").stat().st_mtime_ns == before


def test_reports_on_a_gguf_file_and_packs_one(capsys, plain, tmp_path, text):
    assert main(["convert", str(plain), str(tmp_path / "m.gguf"), "--type", "q4_0", "--quiet"]) == 0
    code, out, _ = run(capsys, plain, tmp_path / "m.gguf", "--report", "--text", text)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["kl_mean"] > 0
    assert run(capsys, tmp_path / "m.gguf", tmp_path / "m", "--format", "q4_0")[0] == 0
    # Blocks travel as they are: the file and the folder are the same model.
    code, out, _ = run(capsys, tmp_path / "m.gguf", tmp_path / "m", "--report", "--text", text)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["same_top_token"] > 0.95


def test_the_choices_are_the_recipes():
    assert set(quantize.FORMATS) == {*RECIPES, *BASE_RECIPES}


def test_mistakes_are_one_sentence(capsys, plain, tmp_path, text):
    bare = plain_folder(tmp_path / "bare", **WHOLE)  # no tokenizer
    cases = [
        ((plain, tmp_path / "m"), "Give --format .* to pack, or --report"),
        ((plain, plain, "--format", "int8"), "SRC and DST are both"),
        ((plain, tmp_path / "none", "--report"), "There is no folder"),
        ((plain, tmp_path / "m", "--report", "--tokens", 1), "--tokens must be at least 2"),
        ((tmp_path / "none", tmp_path / "m", "--format", "int8"), "There is no folder"),
        ((tmp_path / "none.gguf", tmp_path / "m", "--format", "int8"), "none.gguf"),
        ((bare, tmp_path / "m", "--format", "int4"), "has no tokenizer.json"),
        ((plain, tmp_path / "m", "--format", "int4", "--calibration", tmp_path / "no.txt"), "cannot be read"),
        ((plain, text, "--format", "int8"), "is a file, but a folder is to be written there"),
        ((plain, tmp_path / "m", "--format", "int8", "--threads", 0), "number of threads"),
    ]
    for arguments, sentence in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("olmoe: ")
        assert err.count("\n") == 1
        import re

        assert re.search(sentence, err), err
    assert not (tmp_path / "m").exists()
    assert run(capsys, bare, tmp_path / "m", "--format", "int4", "--calibration", "none")[0] == 0


def test_info_shows_packed_folders(capsys, plain, tmp_path):
    run(capsys, plain, tmp_path / "m", "--format", "int4", "--calibration", "none")
    capsys.readouterr()
    assert main(["info", str(tmp_path / "m"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert facts["bytes"]["on_disk"] == size
    assert facts["bytes"]["stored_as"] == ["bfloat16", "q4_0", "q5_0"]
    kinds = {k: v for k, v in facts["packed"].items() if k != "bits_per_weight"}
    assert kinds["output head"] == {"format": "q5_0", "weights": 320 * 32, "bytes": 320 * 22}
    assert sum(kind["weights"] for kind in kinds.values()) == facts["parameters"]["total"]
    assert facts["packed"]["bits_per_weight"] == pytest.approx(8 * size / facts["parameters"]["total"], abs=1e-3)
    assert main(["info", str(tmp_path / "m")]) == 0
    assert "7,040 bytes of 10,240 weights in q5_0" in capsys.readouterr().out


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "held", [("config.json", "notes.txt"), ("config.json", "training_state.pt"), ("config.json", "model.safetensors")]
)
def test_nothing_that_exists_is_replaced_unasked(capsys, plain, tmp_path, held):
    """A folder with notes, a training state, a merged fine-tune: each has a config.json."""
    for name in held:
        target = tmp_path / "mine"
        target.mkdir(exist_ok=True)
        (target / name).write_text("{}")
    before = contents(target)
    code, out, err = run(capsys, plain, target, "--format", "int8")
    assert (code, out) == (2, "")
    assert "--overwrite" in err
    code, out, err = run(capsys, plain, target, "--format", "int8", "--overwrite")
    if held[1] == "model.safetensors":  # no more than what is written anew
        assert (code, err) == (0, "")
        assert packed_file.PackedFile(target).layout.recipe == "int8"
    else:
        assert (code, out) == (2, "")
        assert held[1] in err
        assert contents(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_packed_folder_is_replaced_on_request_and_the_source_never(capsys, plain, tmp_path):
    assert run(capsys, plain, tmp_path / "m", "--format", "int8")[0] == 0
    before = contents(tmp_path / "m")
    assert run(capsys, plain, tmp_path / "m", "--format", "q4_0")[0] == 2
    assert contents(tmp_path / "m") == before
    assert run(capsys, plain, tmp_path / "m", "--format", "q4_0", "--overwrite")[0] == 0
    assert packed_file.PackedFile(tmp_path / "m").layout.recipe == "q4_0"
    source = contents(plain)
    for target in (plain, plain.parent):
        assert run(capsys, plain, target, "--format", "int8", "--overwrite")[0] == 2
    assert contents(plain) == source
