"""docs/finetuning.md: every command runs, in its order, and what it says of defaults is so."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from olmoe.cli.main import main
from olmoe.config import ModelConfig
from olmoe.train.config import ParallelConfig, build
from olmoe.train.finetune.config import PreferenceConfig, SFTConfig, load_config
from olmoe.train.memory import activations, memory
from olmoe.weights import checkpoint
from rank_processes import free_port

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    for folder in ("configs", "examples/chats"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    commands = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "olmoe"
        assert main([*arguments, "--quiet"]) == 0, command
    printed = capsys.readouterr().out
    assert "runs/dpo-tiny/best" in printed
    assert checkpoint.load("merged").config == checkpoint.load("runs/sft-tiny/best").config
    assert (tmp_path / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    (script,) = [block for kind, block in BLOCKS if kind == "python"]
    exec(script, {})
    assert "sft-tiny" in str(next((tmp_path / "runs" / "sft-tiny").glob("best")))


def test_tables_of_the_page_are_those_of_the_configurations():
    *tables, shares = [block for kind, block in BLOCKS if kind == "toml"]
    assert len(tables) == 2
    assert build(ParallelConfig, tomllib.loads(shares)["parallel"], "parallel") == ParallelConfig(data=2)
    plain, adapter = ((ROOT / "configs" / f"{name}.toml").read_text() for name in ("sft-tiny", "sft-tiny-lora"))
    for table, text in zip(tables, (plain, adapter), strict=True):
        for line in table.splitlines():
            key = line.partition("#")[0].strip()
            assert key == "" or key in text, key


@pytest.mark.slow
def test_commands_of_several_processes_run(tmp_path):
    for folder in ("configs", "examples/chats"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    assert len(lines) == 2
    for line in lines:
        launcher, *words = shlex.split(line)
        assert launcher == "torchrun"
        command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port()), *words, "--quiet"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("best") == 1  # one rank tells where the result is
    assert checkpoint.load(tmp_path / "runs" / "dpo-tiny" / "best").config.num_experts == 64


RELEASED = ModelConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
    num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096,
)  # fmt: skip
KINDS = {"all weights": {}, "adapters": {"adapter_rank": 16}, "adapters on nf4": {"adapter_rank": 16, "pack": "nf4"}}


def test_the_table_of_memory_is_calculated():
    rows = re.findall(r"^\| ([a-z0-9 ]+) \| (\d+) \| (.*) \|$", TEXT, re.MULTILINE)
    assert [(kind, int(ranks)) for kind, ranks, _ in rows] == [(k, n) for k in KINDS for n in (1, 2, 4, 8, 64)]
    for kind, ranks, numbers in rows:
        found = memory(RELEASED, 4096, ranks=int(ranks), recompute=True, **KINDS[kind])
        parts = (found.weights, found.gathered, found.gradients, found.optimizer, found.activations, found.total)
        assert numbers.split(" | ") == [f"{value / 1e9:.1f}" for value in parts]
    without = [round(activations(RELEASED, 4096, rank) / 1e9) for rank in (None, 16)]
    assert "activations take {} GB ({} with adapters)".format(*without) in " ".join(TEXT.split())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sft-tiny", SFTConfig), ("sft-tiny-lora", SFTConfig), ("qlora-tiny", SFTConfig), ("dpo-tiny", PreferenceConfig)],
)
def test_configurations_are_valid(name, kind):
    assert load_config(ROOT / "configs" / f"{name}.toml", kind).run.seed == 1


def script():
    spec = importlib.util.spec_from_file_location("story_requests", ROOT / "scripts" / "story_requests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requests_are_obeyed_by_the_stories_that_they_were_made_of():
    made = script()
    rows = [json.loads(line) for line in (ROOT / "examples" / "chats" / "stories.jsonl").read_text().splitlines()]
    asked = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    assert {made.kind_of(prompt) for prompt, _ in asked} == set(made.KINDS)
    assert all(made.obeys(prompt, answer) for prompt, answer in asked if made.kind_of(prompt) != "go on")
    others = [made.obeys(prompt, asked[i - 3][1]) for i, (prompt, _) in enumerate(asked)]
    assert sum(others[i] for i, (prompt, _) in enumerate(asked) if made.kind_of(prompt) != "go on") < 3
    assert not made.obeys(
        "Go on: Tim ran to the big tree and sat down there.", "Tim ran to the big tree and sat down there."
    )
    assert made.obeys("Go on: Tim ran.", "He sat down.")
    assert not made.obeys("Go on: Tim ran.", "He sat")


def test_pairs_answer_the_same_request():
    made = script()
    story = "A cat sat there. It was warm. The sun was bright above. It slept well."
    stories = [story, story.replace("cat", "dog"), story.replace("cat", "hen")]
    rows = list(made.requests(stories, 500, 0, pairs=True))
    assert len(rows) == 3
    assert all(row["chosen"] != row["rejected"] and row["prompt"][0]["role"] == "user" for row in rows)
