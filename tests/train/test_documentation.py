"""docs/training.md: its configurations load, and its commands are understood."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from olmoe.cli.main import _parse
from olmoe.train import parallel
from olmoe.train.config import ParallelConfig, SkipConfig, load_config
from olmoe.train.ranks import Ranks
from training_runs import write_run

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
TABLES = [text for language, text in BLOCKS if language == "toml"]
LINES = [line for language, text in BLOCKS if language != "toml" for line in text.replace("\\\n", "").split("\n")]
COMMANDS = [
    line.split("#")[0].strip() for line in LINES if re.search(r"\bolmoe (train|convert|average|generate) ", line)
]


def configuration(folder: Path, tokenizer: str, text: str):
    return load_config(write_run(folder, tokenizer, **tomllib.loads(text)))


def test_the_page_has_what_is_tested_here():
    assert len(TABLES) == 3
    assert len(COMMANDS) == 7


@pytest.mark.parametrize("text", TABLES[:2])
def test_the_tables_are_configurations(tmp_path, text):
    configuration(tmp_path, "tokenizer.json", text)


def test_the_split_is_for_the_ranks_that_the_page_says(tmp_path):
    config = configuration(tmp_path, "tokenizer.json", TABLES[0] + "[batch]\nsequences = 8\n")
    parallel.check(config, Ranks(size=8))
    assert config.compute.precision == "bf16"
    recipe = tomllib.loads(TABLES[2])
    assert recipe["batch"]["sequences"] * recipe["data"]["sequence_length"] == 4_194_304  # tokens of a step
    assert recipe["batch"]["sequences"] == 4 * recipe["parallel"]["data"]


def test_the_defaults_are_those_of_the_page(tmp_path):
    config = configuration(tmp_path, "tokenizer.json", TABLES[1])
    assert config.skip == SkipConfig()
    assert (ParallelConfig().expert, ParallelConfig().replicate, ParallelConfig().balance) == (1, 1, "rank")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    words = shlex.split(command)
    arguments = _parse(words[words.index("olmoe") + 1 :])
    assert arguments is not None
    assert arguments.command == words[words.index("olmoe") + 1]
