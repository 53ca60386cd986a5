"""`olmoe eval`: tasks go in, a table and a file come out; mistakes are one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")

from olmoe.cli.main import main
from olmoe.io.hub import SHIPPED
from packed_folders import WHOLE, plain_folder

TASKS = Path(__file__).parents[2] / "examples" / "eval"

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What the command sets for a process of its own does not stay here."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["eval", *map(str, arguments)])
    return code, *capsys.readouterr()


def scores(table: str) -> dict[str, float]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {row[4]: float(row[6]) for row in rows}


def test_a_table_and_files(capsys, tmp_path):
    code, out, _ = run(
        capsys, "--tasks", "next_sentence,retell", "--include-path", TASKS, "--limit", 4, "--log-samples",
        "--output", tmp_path / "s.json", "--dtype", "float32", "--quiet", "--offline",
    )  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert scores(out)["acc"] == pytest.approx(found["results"]["next_sentence"]["acc,none"], abs=1e-4)
    assert found["config"]["model_args"] == {"pretrained": "olmoe-tiny"}
    assert found["config"]["limit"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        "s.json", "s.samples.next_sentence.jsonl", "s.samples.retell.jsonl",
    }  # fmt: skip
    lines = (tmp_path / "s.samples.next_sentence.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2, 3]


def test_packed_and_plain_checkpoints(capsys, tmp_path, tokenizer_file):
    plain = plain_folder(tmp_path / "model", tokenizer_file, **WHOLE)
    assert (
        main(["quantize", str(plain), str(tmp_path / "packed"), "--format", "int8", "--calibration", "none", "--quiet"])
        == 0
    )
    options = ("--tasks", "pages", "--include-path", TASKS, "--limit", 3, "--max-length", 40, "--bootstrap-iters", 0)
    found = [scores(run(capsys, model, *options)[1]) for model in (plain, tmp_path / "packed")]
    assert found[0]["bits_per_byte"] == pytest.approx(found[1]["bits_per_byte"], rel=0.02)
    assert found[0] != found[1]


def test_chat_template_policy_and_the_harness_own_options(capsys, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text('{"k": 1}', encoding="utf-8")
    options = ("--tasks", "next_sentence", "--include-path", TASKS, "--limit", 0.1, "--quiet", "--log-samples")
    outputs = []
    for number, more in enumerate(
        [[], ["--apply-chat-template", "--system-instruction", "Be brief."], ["--router-policy", policy]]
    ):
        code, out, _ = run(capsys, *options, "--output", tmp_path / f"{number}.json", *more, "--seed", 3)
        assert code == 0
        samples = (tmp_path / f"{number}.samples.next_sentence.jsonl").read_text("utf-8").splitlines()
        outputs.append([json.loads(line) for line in samples])
        assert out
    plain, chat, other = outputs
    assert len(plain) == 5
    assert chat[0]["arguments"][0][0].startswith("<|endoftext|><|system|>\nBe brief.\n<|user|>\n")
    assert other[0]["arguments"] == plain[0]["arguments"]
    assert other[0]["resps"] != plain[0]["resps"]


def test_generation_arguments(capsys, tmp_path):
    options = ("--tasks", "retell", "--include-path", TASKS, "--limit", 2, "--quiet", "--log-samples")
    run(capsys, *options, "--output", tmp_path / "a.json", "--gen-kwargs", "max_gen_toks=2")
    lines = (tmp_path / "a.samples.retell.jsonl").read_text("utf-8").splitlines()
    assert all(len(json.loads(line)["resps"][0][0].split()) <= 2 for line in lines)
    code, _, err = run(capsys, *options, "--output", tmp_path / "b.json", "--gen-kwargs", "num_beams=4")
    assert code == 2
    assert "olmoe: A task asks for the generation argument num_beams=4" in err
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "next_sentense"], "There is no task 'next_sentense'; did you mean next_sentence"),
        (["--tasks", "next_sentence", "--limit", "1.5"], "--limit must be a whole number of examples, or a share"),
        (["--tasks", "next_sentence", "--limit", "-1"], "--limit must be"),
        (["--tasks", "next_sentence", "--log-samples"], "--log-samples writes files beside --output; give that too."),
        (["--tasks", "next_sentence", "--cache-mib", "0"], "--cache-mib must be a whole number, at least 1, not 0."),
        (["--tasks", "next_sentence", "--num-fewshot", "-1"], "--num-fewshot must be"),
        (["--tasks", "next_sentence", "--batch-size", "x"], "batch_size must be a whole number, at least 1, not 'x'."),
        (["nowhere", "--tasks", "next_sentence", "--offline"], "nowhere"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments, "--include-path", TASKS)
    assert (code, out) == (2, "")
    assert err.startswith("olmoe: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_an_output_that_exists_is_said_before_anything_is_loaded(capsys, tmp_path):
    (tmp_path / "s.json").write_text("mine", encoding="utf-8")
    code, _, err = run(capsys, "nowhere", "--tasks", "x", "--output", tmp_path / "s.json")
    assert code == 2
    assert "exists already" in err


def test_without_the_harness_it_says_what_to_install(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    code, _, err = run(capsys, "--tasks", "x")
    assert code == 2
    assert err == ('olmoe: olmoe eval needs lm-evaluation-harness; install it with: pip install "olmoe[ecosystem]"\n')


def test_a_process_of_its_own_says_nothing_else(tmp_path):
    """Only there are the harness' bars not imported yet; and git, in a folder that is none of its own, says nothing."""
    command = [sys.executable, "-m", "olmoe", "eval", "--tasks", "next_sentence", "--limit", "2", "--offline"]
    done = subprocess.run(
        [*command, "--include-path", str(TASKS)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(scores(done.stdout)) == {"acc", "acc_norm"}
