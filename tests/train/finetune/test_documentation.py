"""docs/finetuning.md: every command runs, in its order, and what it says of defaults is so."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from olmoe.cli.main import main
from olmoe.train.finetune.config import PreferenceConfig, SFTConfig, load_config
from olmoe.weights import checkpoint

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    for folder in ("configs", "examples/chats"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    commands = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
    assert len(commands) == 8
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
    tables = [block for kind, block in BLOCKS if kind == "toml"]
    assert len(tables) == 2
    plain, adapter = ((ROOT / "configs" / f"{name}.toml").read_text() for name in ("sft-tiny", "sft-tiny-lora"))
    for table, text in zip(tables, (plain, adapter), strict=True):
        for line in table.splitlines():
            key = line.partition("#")[0].strip()
            assert key == "" or key in text, key


@pytest.mark.parametrize(
    ("name", "kind"), [("sft-tiny", SFTConfig), ("sft-tiny-lora", SFTConfig), ("dpo-tiny", PreferenceConfig)]
)
def test_configurations_are_valid(name, kind):
    assert load_config(ROOT / "configs" / f"{name}.toml", kind).run.seed == 1
