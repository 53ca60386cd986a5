"""docs/training.md and docs/training-data-and-metrics.md: configurations load, and commands are understood."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from olmoe.cli.main import _parse
from olmoe.config import ModelConfig
from olmoe.train import parallel
from olmoe.train.config import ParallelConfig, SkipConfig, load_config
from olmoe.train.loop import train
from olmoe.train.ranks import Ranks
from olmoe.train.throughput import flops_per_token
from training_runs import read_metrics, write_run

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


# ---- docs/training-data-and-metrics.md ----

DATA_PAGE = (Path(__file__).parents[2] / "docs" / "training-data-and-metrics.md").read_text(encoding="utf-8")
DATA_TABLES = re.findall(r"```toml\n(.*?)```", DATA_PAGE, re.DOTALL)
PLOTS = re.findall(r"^olmoe (plot .*?)(?: *#.*)?$", DATA_PAGE, re.MULTILINE)


@pytest.mark.parametrize("text", DATA_TABLES)
def test_the_tables_of_data_and_metrics_are_configurations(tmp_path, text):
    path = write_run(tmp_path, "tokenizer.json", **(tomllib.loads(text) | {"model": {"max_position_embeddings": 4096}}))
    config = load_config(path)
    for name, table in tomllib.loads(text).items():
        assert all(getattr(getattr(config, name), key) for key in table)


def test_the_table_of_metrics_has_what_a_run_records(tmp_path, tokenizer_file):
    train(load_config(write_run(tmp_path / "run", tokenizer_file)), show_progress=False)
    recorded = {key for record in read_metrics(tmp_path / "run" / "out") for key in record}
    rows = re.findall(r"^\| (`[^|]*) \|", DATA_PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == recorded | {"skipped"}  # which is there when it happens


def test_active_parameters_are_those_of_the_page():
    released = ModelConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096,
    )  # fmt: skip
    active, every = f"{flops_per_token(released) / 6e9:.2f}", f"{released.num_parameters / 1e9:.2f}"
    assert f"{active} of the {every} billion parameters" in " ".join(DATA_PAGE.split())


def test_plots_are_understood():
    assert len(PLOTS) == 3
    assert all(_parse(shlex.split(command)) for command in PLOTS)
