"""docs/training.md and docs/training-data-and-metrics.md: configurations load, and commands are understood."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from olmoe.cli.main import _parse
from olmoe.config import ModelConfig
from olmoe.train import parallel
from olmoe.train.config import ParallelConfig, SkipConfig, load_config
from olmoe.train.loop import train
from olmoe.train.ranks import Ranks
from olmoe.train.throughput import flops_per_token
from training_runs import read_metrics, write_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
TABLES = [text for language, text in BLOCKS if language == "toml"]
LINES = [line for language, text in BLOCKS if language != "toml" for line in text.replace("\\\n", "").split("\n")]
COMMANDS = [
    line.split("#")[0].strip() for line in LINES if re.search(r"\bolmoe (train|convert|average|generate) ", line)
]


def configuration(folder: Path, tokenizer: str, text: str):
    return load_config(write_run(folder, tokenizer, **tomllib.loads(text)))


def test_the_page_has_the_examples_tested_here():
    assert len(TABLES) == 3
    assert len(COMMANDS) == 7


@pytest.mark.parametrize("text", TABLES[:2])
def test_the_toml_tables_are_valid_configurations(tmp_path, text):
    configuration(tmp_path, "tokenizer.json", text)


def test_the_split_matches_the_number_of_ranks_on_the_page(tmp_path):
    config = configuration(tmp_path, "tokenizer.json", TABLES[0] + "[batch]\nsequences = 8\n")
    parallel.check(config, Ranks(size=8))
    assert config.compute.precision == "bf16"
    recipe = tomllib.loads(TABLES[2])
    assert recipe["batch"]["sequences"] * recipe["data"]["sequence_length"] == 4_194_304  # tokens of a step
    assert recipe["batch"]["sequences"] == 4 * recipe["parallel"]["data"]


def test_the_defaults_match_the_page(tmp_path):
    config = configuration(tmp_path, "tokenizer.json", TABLES[1])
    assert config.skip == SkipConfig()
    assert (ParallelConfig().expert, ParallelConfig().replicate, ParallelConfig().balance) == (1, 1, "rank")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_parsed(command):
    words = shlex.split(command)
    arguments = _parse(words[words.index("olmoe") + 1 :])
    assert arguments is not None
    assert arguments.command == words[words.index("olmoe") + 1]


# ---- docs/training-data-and-metrics.md ----

DATA_PAGE = (ROOT / "docs" / "training-data-and-metrics.md").read_text(encoding="utf-8")
DATA_TABLES = re.findall(r"```toml\n(.*?)```", DATA_PAGE, re.DOTALL)
PLOTS = re.findall(r"^olmoe (plot .*?)(?: *#.*)?$", DATA_PAGE, re.MULTILINE)


@pytest.mark.parametrize("text", DATA_TABLES)
def test_toml_tables_of_data_and_metrics_are_valid_configurations(tmp_path, text):
    path = write_run(tmp_path, "tokenizer.json", **(tomllib.loads(text) | {"model": {"max_position_embeddings": 4096}}))
    config = load_config(path)
    for name, table in tomllib.loads(text).items():
        assert all(getattr(getattr(config, name), key) for key in table)


def test_the_table_of_metrics_lists_what_a_run_records(tmp_path, tokenizer_file):
    train(load_config(write_run(tmp_path / "run", tokenizer_file)), show_progress=False)
    recorded = {key for record in read_metrics(tmp_path / "run" / "out") for key in record}
    rows = re.findall(r"^\| (`[^|]*) \|", DATA_PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == recorded | {"skipped"}  # recorded only when it happens


def test_active_parameters_match_the_page():
    released = ModelConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096,
    )  # fmt: skip
    active, every = f"{flops_per_token(released) / 6e9:.2f}", f"{released.num_parameters / 1e9:.2f}"
    assert f"{active} of the {every} billion parameters" in " ".join(DATA_PAGE.split())


def test_plot_commands_are_parsed():
    assert len(PLOTS) == 3
    assert all(_parse(shlex.split(command)) for command in PLOTS)


# ---- variants of stories, and the shipped model's stages ----

PEOPLE = [("girl", "Lily"), ("girl", "Mia"), ("girl", "Sue"), ("boy", "Tim"), ("boy", "Max"), ("boy", "Bob")]
THINGS = "kite ball apple drum cake owl".split()


def stories() -> list[str]:
    """One story for every pair of a child and a thing."""
    said = {"girl": ("She", "her"), "boy": ("He", "his")}
    return [
        f"One day, a {child} named {name} found {'an' if thing[0] in 'ao' else 'a'} {thing}. "
        f"{said[child][0]} put the {thing} in {said[child][1]} bag. The red {thing} was well-known to {name}. "
        f"Then {name} said {said[child][1]} {thing} jumped and danced."
        for child, name in PEOPLE
        for thing in THINGS
    ]


@pytest.fixture
def vary(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield importlib.import_module("vary_stories")
    for name in ("vary_stories", "story_phrases"):
        sys.modules.pop(name, None)


def test_replacement_words_have_the_same_form(vary):
    words = vary.Words(stories(), least=6)
    assert {"ball", "drum", "cake"} <= set(words.alike("kite")) <= set(THINGS) - {"kite"}
    assert words.alike("girl") == []  # other words agree with it in gender
    assert words.alike("danced") in ([], ["jumped"])  # of the same form only
    assert words.alike("well-known") == words.alike("nowhere") == []


def test_names_are_replaced_by_names_of_the_same_sex(vary):
    names = vary.Names(stories())
    generator = np.random.default_rng(0)
    found = Counter(re.search(r"(girl|boy) named (\w+)", names.varied(each, generator)).groups() for each in stories())
    assert set(found) == set(PEOPLE)
    assert names.varied("Kim saw Lily and Lilypad.", generator).startswith("Kim saw ")
    assert names.varied("Then Lily sat. Lilypad", generator).endswith("Lilypad")


def test_variants_are_consistent_and_reproducible(vary):
    made = list(vary.variants(stories(), 3, 0.5, seed=1))
    assert made == list(vary.variants(stories(), 3, 0.5, seed=1))
    assert len(made) == 3 * len(stories())
    assert len(set(made)) < len(made)  # six children and six things give no more stories
    for story in made:
        shape = re.fullmatch(
            r"One day, a (girl|boy) named (\w+) found (an? \w+)\. (?:She|He) put the (\w+) in (?:her|his) bag\. "
            r"The red (\w+) was well-known to (\w+)\. Then (\w+) said (?:her|his) (\w+) jumped and danced\.",
            story,
        )
        assert shape is not None, story
        child, name, found, *rest = shape.groups()
        article, thing = found.split()
        assert (child, name) in PEOPLE
        assert rest == [thing, thing, name, name, thing]
        assert article == ("an" if thing[0] in "ao" else "a")
    changed = sum(before not in made for before in stories())
    assert changed < len(stories())
    counts = Counter(re.search(r"the (\w+) in", story)[1] for story in made)
    assert max(counts.values()) < 3 * min(counts.values())  # about as frequent as in the corpus


def test_a_corpus_without_replaceable_words_is_unchanged(vary):
    few = ["The sun was up.", "It was late."]
    assert sorted(vary.variants(few, 2, 1.0, seed=0)) == sorted(few * 2)


def test_the_script_writes_documents(vary, tmp_path, monkeypatch, capsys):
    given, target = tmp_path / "stories.txt", tmp_path / "varied.txt"
    given.write_text("\n<|endoftext|>\n".join(stories()), encoding="utf-8")
    command = next(line for line in DATA_PAGE.splitlines() if line.startswith("python scripts/vary_stories.py "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    vary.main()
    assert capsys.readouterr().out == "10 variants of 36 stories\n"
    texts = target.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    assert len(texts) == 361
    assert texts[-1] == ""


def test_each_stage_of_olmoe_tiny_starts_from_the_one_before():
    """The last stage is what ships, and the model card names all of them."""
    names = ["olmoe-tiny", *(f"olmoe-tiny-stage{number}" for number in range(2, 5))]
    configs = [load_config(ROOT / "configs" / f"{name}.toml") for name in names]
    assert configs[0].run.initialize_from is None
    for before, after in pairwise(configs):
        assert after.run.initialize_from == f"{before.run.output}/best"
        assert after.model == before.model
        assert after.data.valid == before.data.valid
