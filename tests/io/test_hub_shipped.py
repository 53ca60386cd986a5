"""olmoe-tiny-instruct as it ships: its name, its size, its card, and that it does what it is asked."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from olmoe.cli.main import main
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.io import hub
from olmoe.weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
CARD = (hub.SHIPPED_CHAT / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "story_obedience.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("olmoe-tiny-instruct")


def ask(llm: LLM, *asked: str) -> str:
    """The likeliest answer to the last of these, each after the answer to the one before."""
    messages: list[dict[str, str]] = []
    for each in asked:
        messages.append({"role": "user", "content": each})
        answer = llm.chat(messages, SamplingParams(max_new_tokens=300), show_progress=False)[0]
        assert answer.finish_reason == "eos"
        messages.append({"role": "assistant", "content": answer.text})
    return answer.text


@pytest.mark.parametrize("name", ["olmoe-tiny-instruct", "OLMoE-Tiny-Instruct"])
def test_its_name_is_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_shipped(name)
    assert hub.resolve(name) == hub.resolve_config(name) == Path(hub.folder_or_id(name)) == hub.SHIPPED_CHAT
    (tmp_path / name).mkdir()  # a folder of that name is what is meant
    assert not hub.is_shipped(name)
    assert hub.resolve(name) == Path(name)


def test_the_folder_is_small_and_complete():
    names = {path.name for path in hub.SHIPPED_CHAT.iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in hub.SHIPPED_CHAT.iterdir()) <= 9_000_000
    layout = Checkpoint.open(hub.SHIPPED_CHAT).layout
    assert layout is not None
    credits = {"storybooks_attribution.tsv", "gitenberg_heads.tsv"}
    assert credits <= names
    for name in credits:
        assert (hub.SHIPPED_CHAT / name).read_bytes() == (hub.SHIPPED / name).read_bytes()
    ours = (hub.SHIPPED / "README.md").read_text(encoding="utf-8")
    table = ours[ours.index("| text | source | licence |") : ours.index("\n\nThe weights")]
    assert table in CARD


def test_the_card_says_what_was_measured():
    """Every row of its table, in the order of the results' kinds, and the two numbers below it."""
    measured = RESULTS["measured"]
    rows = re.findall(
        r"^\| .* \| (\d+) \| (\d+)% \((\d+)% to (\d+)%\) \| (\d+)% \((\d+)% to (\d+)%\) \| (\d+)% \|$",
        CARD,
        re.MULTILINE,
    )
    expected = set()
    for kind in (*measured["greedy"]["kinds"], None):
        greedy, sampled, chance = (
            found["all requests"] if kind is None else found["kinds"][kind]
            for found in (measured["greedy"], measured["sampled"], measured["stories"])
        )
        shares = [greedy["obeyed"], *greedy["interval"], sampled["obeyed"], *sampled["interval"], chance["obeyed"]]
        expected.add((str(greedy["n"]), *(f"{share:.0%}".removesuffix("%") for share in shares)))
    assert len(rows) == len(measured["greedy"]["kinds"]) + 1
    assert set(rows) == expected
    assert f"{measured['greedy']['single words']['obeyed']:.0%} are in the story" in " ".join(CARD.split())
    assert measured["greedy"]["all requests"]["obeyed"] > 3 * measured["stories"]["all requests"]["obeyed"]


def test_it_does_what_it_is_asked(llm):
    story = ask(llm, "Tell me a story about a dog named Max.")
    assert "dog" in story
    assert story.count("Max") > 1
    assert len(story.split(". ")) > 4
    beginning = "Once upon a time, there was a little girl named Lily."
    assert ask(llm, f"Tell a story that begins with: {beginning}").startswith(beginning)
    assert "cat" in ask(llm, "Tell a story with the word cat.")
    assert "I can tell stories" in ask(llm, "What is the capital of Peru?")
    assert ask(llm, "Hi!", "Tell me a story about a little bird named Kiki.").count("Kiki") > 1


def test_olmoe_chat_talks_to_it_where_no_model_is_named(capsys, monkeypatch, llm):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi!\n"), encoding="utf-8"))
    assert main(["chat"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ask(llm, "Hi!") + "\n"
    assert "base model" not in printed.err  # a remark that others with OLMoE's template get
