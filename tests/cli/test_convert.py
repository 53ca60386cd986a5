"""`olmoe convert`: the direction follows from the suffixes; mistakes are one sentence and 2."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from conftest import make_model
from gguf_files import save_folder, write_tiny
from olmoe.cli.main import main
from olmoe.weights import hf_folder
from olmoe.weights.gguf.source import GGUFSource


def convert(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["convert", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    model = make_model(hidden_size=64, intermediate_size=32)
    return save_folder(model, tmp_path_factory.mktemp("model") / "model", tokenizer_file, dtype=torch.bfloat16)


@pytest.mark.parametrize(("option", "kind"), [((), "BF16"), (("--type", "f16"), "F16"), (("--type", "q4_0"), "Q4_0")])
def test_a_folder_becomes_a_file(capsys, folder, tmp_path, option, kind):
    code, out, _ = convert(capsys, *option, folder, tmp_path / "x.gguf")
    assert (code, out) == (0, "")
    assert GGUFSource(tmp_path / "x.gguf").stored_as("lm_head.weight") == (kind,)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(("option", "dtype"), [((), "BF16"), (("--type", "f32"), "F32")])
def test_a_file_becomes_a_folder(capsys, tmp_path, option, dtype):
    write_tiny(tmp_path / "x.GGUF")
    assert convert(capsys, tmp_path / "x.GGUF", tmp_path / "out", *option)[0] == 0
    assert {tensor.dtype for tensor in hf_folder.read_headers(tmp_path / "out").values()} == {dtype}
    assert main(["info", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("option", "dtype"), [((), "BF16"), (("--type", "f32"), "F32")])
def test_a_folder_becomes_one_for_other_software(capsys, folder, tmp_path, option, dtype):
    assert main(["quantize", str(folder), str(tmp_path / "packed"), "--format", "q4_0", "--quiet"]) == 0
    assert convert(capsys, tmp_path / "packed", tmp_path / "out", "--quiet", *option) == (0, "", "")
    assert {tensor.dtype for tensor in hf_folder.read_headers(tmp_path / "out").values()} == {dtype}
    assert main(["info", str(tmp_path / "out")]) == 0


def test_progress_goes_to_stderr_of_a_terminal_only(capsys, folder, tmp_path):
    assert convert(capsys, folder, tmp_path / "x.gguf")[1:] == ("", "")


def test_both_ways_give_the_same_text(capsys, folder, tmp_path):
    convert(capsys, folder, tmp_path / "x.gguf")
    convert(capsys, tmp_path / "x.gguf", tmp_path / "out")
    texts = []
    for model in (folder, tmp_path / "out"):
        arguments = ["--temperature", "0", "--max-new-tokens", "8", "--quiet", "--model", str(model)]
        assert main(["generate", "Once upon a time", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{tmp}/a.gguf", "{tmp}/b.gguf"), "Only one of SRC and DST may end in .gguf, but both do"),
        (("{folder}", "{tmp}"), "{tmp} exists already"),
        (("{folder}", "{tmp}/out", "--type", "q8_0"), "leave --type out and use `olmoe quantize`"),
        (("{tmp}/no", "{tmp}/out"), "There is no folder '{tmp}/no'"),
        (("{tmp}/no.gguf", "{tmp}/out"), "There is no file {tmp}/no.gguf"),
        (("{tmp}/no", "{tmp}/x.gguf"), "There is no folder '{tmp}/no'"),
        (("{folder}", "{tmp}/exists.gguf"), "{tmp}/exists.gguf exists already"),
        (("{tmp}/exists.gguf", "{tmp}"), "{tmp} exists already"),
        (("{tmp}/exists.gguf", "{tmp}/out"), "exists.gguf is not a GGUF file"),
        (("{tmp}/exists.gguf", "{tmp}/out", "--type", "q4_0"), "leave --type out and use `olmoe quantize`"),
        (("{folder}", "{tmp}/exists.gguf/x.gguf"), "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence_and_2(capsys, folder, tmp_path, arguments, sentence):
    (tmp_path / "exists.gguf").write_text("x")
    places = {"folder": folder, "tmp": tmp_path}
    code, out, err = convert(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("olmoe: ")
    assert sentence.format(**places) in err
    assert [path.name for path in tmp_path.iterdir()] == ["exists.gguf"]


def test_an_unknown_type_is_refused(capsys, folder, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(folder), str(tmp_path / "x.gguf"), "--type", "q2_k"])
    assert caught.value.code == 2


def test_help_needs_no_torch():
    program = "import sys; from olmoe.cli.main import main\ntry: main(['convert', '--help'])\nexcept SystemExit: pass\n"
    program += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SRC" in done.stdout


def test_what_exists_is_replaced_on_request_alone(capsys, folder, tmp_path):
    file, model = tmp_path / "x.gguf", tmp_path / "model"
    file.write_text("notes")
    assert convert(capsys, folder, file)[0] == 2
    assert file.read_text() == "notes"
    assert convert(capsys, folder, file, "--overwrite", "--quiet") == (0, "", "")
    assert convert(capsys, file, model, "--quiet") == (0, "", "")
    before = (model / "model.safetensors").read_bytes()
    code, _, err = convert(capsys, file, model, "--type", "f32")
    assert (code, "--overwrite" in err) == (2, True)
    assert (model / "model.safetensors").read_bytes() == before
    assert convert(capsys, file, model, "--type", "f32", "--overwrite", "--quiet") == (0, "", "")
    assert (model / "model.safetensors").stat().st_size > 1.9 * len(before)
    (model / "notes.txt").write_text("notes")
    code, _, err = convert(capsys, file, model, "--overwrite")
    assert (code, "notes.txt" in err) == (2, True)
    assert (model / "notes.txt").read_text() == "notes"
    # A folder that holds the source is not replaced by it.
    assert convert(capsys, file, tmp_path, "--overwrite")[0] == 2
    assert file.is_file()
    (tmp_path / "dir.gguf").mkdir()
    assert convert(capsys, folder, tmp_path / "dir.gguf", "--overwrite")[0] == 2
