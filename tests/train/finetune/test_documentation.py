"""docs/finetuning.md: every command runs, in order, and the stated defaults are right."""

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

import numpy as np
import pytest

from olmoe.cli.main import main
from olmoe.config import ModelConfig
from olmoe.engine.llm import LLM
from olmoe.train.config import ParallelConfig
from olmoe.train.finetune.config import PreferenceConfig, SFTConfig, load_config
from olmoe.train.memory import activations, memory
from olmoe.train.toml_file import build
from olmoe.weights import checkpoint
from ports import kept_port

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


def test_tables_of_the_page_match_the_configurations():
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
    lines = [line for line in lines if line.startswith("torchrun ")]
    assert len(lines) == 2
    for line in lines:
        _, *words = shlex.split(line)
        with kept_port() as port:
            command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(port), *words, "--quiet"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("best") == 1  # only one rank reports where the result is
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
        found = memory(RELEASED, 4096, ranks=int(ranks), frozen_bytes=2, recompute=True, **KINDS[kind])
        parts = (found.weights, found.gathered, found.gradients, found.optimizer, found.activations, found.total)
        assert numbers.split(" | ") == [f"{value / 1e9:.1f}" for value in parts]
    without = [round(activations(RELEASED, 4096, rank) / 1e9) for rank in (None, 16)]
    assert "activations take {} GB ({} with adapters)".format(*without) in " ".join(TEXT.split())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sft-tiny", SFTConfig),
        ("sft-tiny-lora", SFTConfig),
        ("sft-tiny-instruct", SFTConfig),
        ("sft-tiny-instruct-own", SFTConfig),
        ("sft-tiny-instruct-own-2", SFTConfig),
        ("sft-tiny-instruct-own-3", SFTConfig),
        ("sft-tiny-instruct-own-4", SFTConfig),
        ("qlora-tiny", SFTConfig),
        ("dpo-tiny", PreferenceConfig),
    ],
)
def test_configurations_are_valid(name, kind):
    assert load_config(ROOT / "configs" / f"{name}.toml", kind).run.seed == 1


def script(name: str = "story_requests"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requests_are_satisfied_by_the_stories_they_were_made_from():
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


# ---- olmoe-tiny-instruct ----

NAMES = "Lily Tim Sue Max Ben Mia Tom Amy Sam Kim Ann Bob".split()
THINGS = "kite ball boat drum cake hat lamp coin bell rope cup leaf".split()


def stories(count: int) -> list[str]:
    """`count` stories, each about a different child and thing."""
    children = [(NAMES[i % 12], THINGS[i // 12 % 12]) for i in range(count)]
    return [
        f"Once upon a time, there was a little girl named {name}. She found a {thing} in the park.\n\n"
        f"{name} took the {thing} to her mom. The {thing} was red and shiny. They played with the {thing}, and {name} "
        "was happy."
        for name, thing in children
    ]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.mark.parametrize("held_out", [False, True])
def test_chats_are_satisfied_by_the_stories_they_were_made_from(scripts, held_out):
    made, measured = script("story_chats"), script("story_obedience")
    rows = list(made.chats(stories(144), 4, 1200, 1, held_out))
    kinds = {row["kind"] for row in rows}
    assert kinds - {"short"} == {*made.KINDS, "talk"}
    assert held_out or "short" in kinds  # few of the held-out stories have enough words for one
    for row in rows:
        assert [message["role"] for message in row["messages"]][-2:] == ["user", "assistant"]
        assert measured.obeys(row, row["messages"][-1]["content"]), row
        for message in row["messages"][:-1]:
            # The beginning is context: it is not trained on, and half a story is not presented as a whole one.
            assert message["role"] == "user" or message.get("weight") == 0 or message["content"] == made.WELCOME
    share = measured.summary(rows, measured.strangers(rows))["kinds"]
    assert share["words"]["obeyed"] < 0.2
    assert share["talk"]["obeyed"] < 0.5
    assert list(made.chats(stories(144), 4, 1200, 1, held_out)) == rows


def test_held_out_requests_are_not_in_the_training_data(scripts):
    made = script("story_chats")
    learned, measured = (set(made.small_talk(held_out)) for held_out in (False, True))
    assert {asked for asked, _ in learned}.isdisjoint(asked for asked, _ in measured)
    assert len(measured) > 40


@pytest.mark.parametrize(
    ("kind", "asked", "answer", "obeyed"),
    [
        ("words", ["dog", "hat"], "A dog sat. It had a hat. It slept.", True),
        ("words", ["dog", "hat"], "A dog sat. It had hats. It slept.", False),
        ("words", ["dog"], "A dog sat. It slept. It", False),
        ("begins", ["A dog sat."], "A dog sat. It slept.", True),
        ("begins", ["A dog sat."], "The dog sat. It slept.", False),
        ("go on", ["Max"], "Then Max ran home.", True),
        ("go on", ["Max"], "Max found a hat.", False),  # unchanged
        ("sentence", ["hat"], "Max had a hat.", True),
        ("sentence", ["hat"], "Max had a hat. It was red.", False),
        ("short", ["hat"], "Max had a hat. It was red.", True),
        ("short", ["hat"], "Max had a hat.", False),
        ("short", ["hat"], "Max ran. " * 6 + "He had a hat.", False),
        ("talk", ["stories"], "I can tell stories.", True),
    ],
)
def test_obedience_is_measured_by_what_was_asked(scripts, kind, asked, answer, obeyed):
    given = {"role": "user", "content": "Go on: Max found a hat." if kind == "go on" else "?"}
    row = {"kind": kind, "asked": asked, "messages": [given, {"role": "assistant", "content": ""}]}
    assert script("story_obedience").obeys(row, answer) is obeyed


@pytest.fixture(scope="module")
def storyteller() -> LLM:
    return LLM("olmoe-tiny")


def test_sampling_is_helped_to_the_words_that_were_asked_for(scripts, storyteller):
    """They are said, in full and not too often, and a story begins as it shall."""
    own = script("own_stories")

    def sample(row, help_by):
        params = own.sampling(row, storyteller.tokenizer, np.random.default_rng(0), 0.8, help_by)
        answers = storyteller.generate([f"Once there was a {x}" for x in THINGS], params, show_progress=False)
        return params, [answer.text for answer in answers]

    asked = {"kind": "words", "asked": ["ambulance", "garden"]}
    params, texts = sample(asked, 20.0)
    assert len(storyteller.tokenizer.encode(" ambulance")) > 1
    for text in texts:
        for word in asked["asked"]:
            assert 0 < len(re.findall(rf"\b{word}", text)) <= params.grammar.times
    assert not all("garden" in text for text in sample(asked, 0.0)[1])
    beginning = "One day, a little fox found a bell."
    _, texts = sample({"kind": "begins", "asked": [beginning]}, 0.0)
    assert all(text.startswith(beginning) for text in texts)


@pytest.mark.parametrize(
    ("answer", "well"),
    [
        ("A dog sat. It had a hat.", True),
        ("A dog sat. It had a hut.", False),  # an unknown word
        ("A dog sat. It had a hat. A dog sat.", False),
        ("A dog sat, a dog sat, a dog sat, a dog sat.", False),
        ("A hat, hat, a hat, hat. It had a hat.", False),
    ],
)
def test_what_reads_well_has_no_unknown_words_and_no_repetition(scripts, answer, well):
    own = script("own_stories")
    known = own.spoken(["A dog sat. It had a hat. a"] * 2)
    assert own.reads_well({"kind": "words", "asked": ["hat"]}, answer, known) is well


@pytest.mark.parametrize(("share", "turns"), [(0.0, 2), (1.0, 4)])
def test_a_share_of_requests_follows_small_talk_that_is_not_learned(scripts, share, turns):
    row = {
        "kind": "any",
        "asked": [],
        "messages": [{"role": "user", "content": "A story, please!"}, {"role": "assistant"}],
    }
    messages = script("own_stories").after_talk(row, np.random.default_rng(0), share)["messages"]
    assert len(messages) == turns
    assert messages[-2:] == row["messages"]
    assert all(message["weight"] == 0 for message in messages[1:-2:2])


def test_the_worked_example_runs(scripts, tmp_path, monkeypatch, capsys):
    """Its commands in order, on a corpus of a few stories, up to measuring the checkpoint."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for part in ("train", "valid"):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        text = "\n<|endoftext|>\n".join(stories(24))
        (tmp_path / "corpus" / part / "stories_tinystories.txt").write_text(text, encoding="utf-8")
    (tmp_path / "runs").mkdir()
    section = TEXT[TEXT.index("## A worked example") :].replace("\\\n", "")
    commands = re.findall(r"^(?:python|olmoe) .*$", section[: section.index("\n## ", 5)], re.MULTILINE)
    names = [command.split()[1].removeprefix("scripts/").removesuffix(".py") for command in commands]
    chats, own = ["story_chats"], ["own_stories"]
    first, second = [*chats * 2, "sft", "story_obedience"], [*chats, *own * 3, "sft", *own * 3, "sft"]
    assert names == [*first, *second, *chats, *own * 2, "sft", *own * 2, "sft", "ship_instruct"]
    for command in commands[:-1]:
        command = re.sub("--first [0-9]+", "", re.sub("--count [0-9]+", "--count 4", command))
        program, *arguments = shlex.split(command.replace("CORPUS", "corpus"))
        # So few stories make fewer steps.
        last = max(Path("runs").glob("tiny-instruct/checkpoints/step-*"), default=Path())
        arguments = [re.sub(r"checkpoints/step-\d+", f"checkpoints/{last.name}", each) for each in arguments]
        if program == "olmoe":
            config = Path(arguments[1])
            text = config.read_text(encoding="utf-8")
            config.write_text(re.sub(r"checkpoints/step-\d+", f"checkpoints/{last.name}", text), encoding="utf-8")
            assert main([*arguments, "--quiet"]) == 0
            continue
        monkeypatch.setattr(sys, "argv", arguments)
        script(Path(arguments[0]).stem).main()
        if "own_stories" in command and not Path(arguments[2]).read_text(encoding="utf-8"):
            # A model of a few steps does nothing that it is asked.
            shutil.copy("runs/chats.jsonl", arguments[2])
    printed = capsys.readouterr().out
    assert '"all requests"' in printed
    assert printed.count("requests, kept") == 10
    assert (tmp_path / "runs" / "tiny-instruct-own-4" / "best" / "model.safetensors").is_file()


def test_the_card_has_the_commands_of_the_page(scripts):
    ship = script("ship_instruct")
    card = (ROOT / "src" / "olmoe" / "assets" / "olmoe-tiny-instruct" / "README.md").read_text(encoding="utf-8")
    assert ship.RECIPE in card
    assert [line for line in ship.RECIPE.splitlines() if line not in TEXT] == []
