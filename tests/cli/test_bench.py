"""`olmoe bench`: ceiling first, table, one line of JSON last; a sentence for what cannot be measured."""

from __future__ import annotations

import json
import re

import pytest
import torch

from configurations import small_config
from conftest import make_model
from olmoe.bench import ceilings
from olmoe.cli.main import main
from olmoe.ops import cpu
from olmoe.ops.cpu import extension
from olmoe.weights import export
from packed_folders import WHOLE, packed_folder, plain_folder

QUICK = ["--prefill", "8", "--decode", "3", "--context", "4", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    """A gigabyte takes long on a busy machine; megabytes show the same."""
    original = ceilings.read_bandwidth
    monkeypatch.setattr(ceilings, "read_bandwidth", lambda *arguments, **options: original(1, 2**22))


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "config.json"
    path.write_text(small_config(**WHOLE).to_json(), encoding="utf-8")
    return path


def bench(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["bench", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_ceiling_comes_first_and_one_line_of_json_last(capsys, config_file):
    code, out, _ = bench(capsys, "--random-weights", config_file, *QUICK)
    assert code == 0
    lines = out.splitlines()
    assert re.fullmatch(
        r"Memory reads reach [\d.]+ GB/s\. A token reads [\d.]+ [GM]B of weights and, at context 4, "
        r"[\d.]+ [GM]B of keys and values: at most [\d.]+ tokens/s\.",
        lines[0],
    )
    assert any(line.startswith("prefill 8 ") for line in lines)
    (decode,) = (line for line in lines if line.startswith("decode at 4 "))
    facts = json.loads(lines[-1])
    shown = float(decode.removeprefix("decode at 4 ").split()[0])
    assert shown == pytest.approx(facts["decode_tokens_per_s"], abs=0.1)
    assert facts["format"] == "int4"
    assert facts["random_weights"] is True
    assert facts["share_of_ceiling"] == pytest.approx(
        facts["decode_tokens_per_s"] / facts["ceiling"]["decode_tokens_per_s"], rel=0.05, abs=1e-3
    )
    for key in ("prefill_tokens_per_s", "achieved_gb_per_s", "load_s", "peak_memory_gb", "cpu", "threads", "versions"):
        assert facts[key] is not None, key


def test_json_alone(capsys, config_file):
    code, out, _ = bench(capsys, "--random-weights", config_file, "--format", "bf16", "--batch", "3", "--json", *QUICK)
    assert code == 0
    (line,) = out.splitlines()
    facts = json.loads(line)
    assert (facts["format"], facts["batch"], facts["context"]) == ("bf16", 3, 4)


def test_a_batch_is_named_in_the_table(capsys, config_file):
    _, out, _ = bench(capsys, "--random-weights", config_file, "--batch", "2", *QUICK)
    assert "A step of 2 tokens reads" in out.splitlines()[0]
    assert "decode at 4, batch 2 " in out


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ([], {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}),
        (
            ["--temperature", "0.8", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01"],
            {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
        ),
    ],
    ids=["as generate", "sampled"],
)
def test_the_whole_path_stands_beside_bare_steps(capsys, config_file, options, sampling):
    code, out, _ = bench(capsys, "--random-weights", config_file, "--whole-path", *options, *QUICK)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("Memory reads reach ")
    whole = json.loads(lines[-1])["whole_path"]
    assert whole["sampling"] == sampling
    assert whole["rounds"] == 1
    # One round, so that its ratio is that of the two numbers.
    assert whole["ratio"] == pytest.approx(whole["whole_tokens_per_s"] / whole["bare_tokens_per_s"], rel=0.01, abs=1e-3)
    (line,) = (line for line in lines if line.startswith("whole path at 4, in turn "))
    assert line.endswith(f"{whole['ratio']:.3f} of bare steps")


@pytest.mark.parametrize("own", [True, False], ids=["its own tokenizer", "a stand-in"])
def test_the_whole_path_of_a_checkpoint(capsys, tmp_path, tokenizer_file, own):
    folder = plain_folder(tmp_path / "plain", tokenizer_file if own else None)
    code, out, _ = bench(capsys, "--model", folder, "--whole-path", "--json", *QUICK)
    assert code == 0
    assert json.loads(out)["whole_path"]["whole_tokens_per_s"] > 0


def test_without_it_there_is_none(capsys, config_file):
    _, out, _ = bench(capsys, "--random-weights", config_file, "--json", *QUICK)
    assert "whole_path" not in json.loads(out)


def test_checkpoints_are_measured_in_what_they_are_stored_as(capsys, tmp_path):
    folder = tmp_path / "plain"
    export.save(make_model(), folder, dtype=torch.bfloat16)
    for format, expected in ((None, "bf16"), ("fp32", "fp32")):
        chosen = [] if format is None else ["--format", format]
        code, out, _ = bench(capsys, "--model", folder, *chosen, "--json", *QUICK)
        assert code == 0
        facts = json.loads(out)
        assert (facts["format"], facts["random_weights"], facts["model"]) == (expected, False, str(folder))


def test_packed_checkpoints_are_measured(capsys, tmp_path):
    folder = packed_folder(tmp_path / "packed", "int8", **WHOLE)
    code, out, _ = bench(capsys, "--model", folder, "--json", *QUICK)
    assert code == 0
    assert json.loads(out)["format"] == "int8"


def test_the_shipped_model_is_the_default_and_bounds_the_prompt(capsys):
    code, out, _ = bench(capsys, "--decode", "1", "--context", "1", "--repeats", "1", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["model"], facts["prefill"]) == ("olmoe-tiny", 512)


@pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")
def test_threads_backend_and_instruction_set_are_used(capsys, config_file):
    best = cpu.isa()
    try:
        code, out, _ = bench(
            capsys,
            "--random-weights",
            config_file,
            "--threads",
            1,
            "--isa",
            "scalar",
            "--backend",
            "cpu",
            "--json",
            *QUICK,
        )
    finally:
        cpu.set_isa(best)
    assert code == 0
    facts = json.loads(out)
    assert (facts["threads"], facts["isa"], facts["backend"]) == (1, "scalar", "cpu")


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--random-weights", "no-such-file"], ["'no-such-file'", "1b-7b"]),
        (["--random-weights", "CONFIG", "--format", "int3"], ["'int3'", "int4"]),
        (["--random-weights", "CONFIG", "--prefill", "0"], ["--prefill", "0"]),
        (["--random-weights", "CONFIG", "--batch", "-2"], ["--batch", "-2"]),
        (["--random-weights", "CONFIG", "--threads", "0"], ["threads"]),
        (["--random-weights", "CONFIG", "--backend", "cuda"], ["'cuda'"]),
        (["--random-weights", "CONFIG", "--backend", "torch", "--isa", "scalar"], ["--isa", "torch"]),
        (["--random-weights", "CONFIG", "--prefill", "1000"], ["1000", "128"]),
        (["--random-weights", "CONFIG", "--context", "100", "--decode", "29"], ["129", "128"]),
        (["--random-weights", "CONFIG", "--top-p", "0.9"], ["--top-p 0.9", "--whole-path"]),
        (["--random-weights", "CONFIG", "--temperature", "0"], ["--temperature 0.0", "--whole-path"]),
        (["--random-weights", "CONFIG", "--whole-path", "--batch", "2"], ["--whole-path", "--batch 2"]),
        (["--random-weights", "CONFIG", "--whole-path", "--top-p", "2"], ["top_p", "2.0"]),
        (["--random-weights", "CONFIG", "--whole-path", "--context", "100", "--decode", "28"], ["129", "128"]),
        (["--model", "./no/such/folder"], ["folder"]),
        (["--format", "int4"], ["olmoe quantize"]),  # of the shipped model, which is not packed
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_one_sentence(capsys, config_file, arguments, mentions):
    code, out, err = bench(capsys, *(str(config_file) if a == "CONFIG" else a for a in arguments))
    assert (code, out) == (2, "")
    assert re.fullmatch(r"olmoe: [^\n]+\.\n", err), err
    for text in mentions:
        assert text in err


def test_a_format_for_a_packed_checkpoint_is_refused(capsys, tmp_path):
    folder = packed_folder(tmp_path / "packed", "int8", **WHOLE)
    code, _, err = bench(capsys, "--model", folder, "--format", "int4")
    assert code == 2
    assert "int8 already" in err


@pytest.mark.skipif(not cpu.available(), reason="the C++ kernels are not built")
def test_an_unknown_instruction_set_is_refused(capsys, config_file):
    code, _, err = bench(capsys, "--random-weights", config_file, "--isa", "mmx")
    assert code == 2
    assert "scalar" in err


def test_missing_kernels_are_refused_when_asked_for(capsys, monkeypatch, config_file):
    monkeypatch.setattr(extension, "_load", lambda: (None, "they are not installed"))
    for option in (["--backend", "cpu"], ["--isa", "scalar"]):
        code, _, err = bench(capsys, "--random-weights", config_file, *option)
        assert code == 2
        assert "not installed" in err
    code, out, _ = bench(capsys, "--random-weights", config_file, "--json", *QUICK)
    assert code == 0
    assert json.loads(out)["isa"] is None
