"""Requests and answers out of a corpus of stories, to teach a model to do what it is asked, and how often it does.

    python scripts/story_requests.py write ../shared/corpus/train/stories_tinystories.txt requests.jsonl
    python scripts/story_requests.py write STORIES pairs.jsonl --pairs
    python scripts/story_requests.py measure requests-valid.jsonl --model runs/sft/best --count 200

Every story becomes one request of three kinds: for a story with three of its words, for one that begins with its first
sentence, and for its second half. The answer is the story, so whoever wrote it said what is learned. In pairs the
rejected answer is another story. `measure` counts what a program can see: the words are all there; the beginning is
word for word the one that was asked for; what goes on ends a sentence and is not what was given.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoe.io.documents import read_documents

KINDS = ("words", "begins", "go on")
# Words of a request: neither those of every story nor names, which stand for nothing by themselves.
WORD = re.compile(r"(?<![\w'])[a-z]{4,}(?![\w'])")
_SENTENCE = re.compile(r'[^.!?]+[.!?]+["\u201d]?')


def main() -> None:
    """Write requests, or measure how often a model obeys them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("stories", type=Path, help="stories, divided by lines of <|endoftext|>")
    write.add_argument("target", type=Path)
    write.add_argument("--count", type=int, default=0, help="of requests (0: one a story)")
    write.add_argument("--most", type=int, default=1200, metavar="CHARACTERS", help="of a story (%(default)s)")
    write.add_argument("--pairs", action="store_true", help="preferences, for olmoe dpo")
    write.add_argument("--seed", type=int, default=0)
    measure = commands.add_parser("measure")
    measure.add_argument("requests", type=Path)
    measure.add_argument("--model", required=True)
    measure.add_argument("--adapter")
    measure.add_argument("--count", type=int, default=200)
    measure.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()
    if arguments.command == "write":
        stories = [story for story in read_documents(arguments.stories) if isinstance(story, str)]
        rows = list(requests(stories, arguments.most, arguments.seed, arguments.pairs))
        rows = rows[: arguments.count or len(rows)]
        arguments.target.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        print(f"{len(rows)} requests of {len(stories)} stories")
    else:
        print(json.dumps(obedience(arguments)))


def requests(stories: list[str], most: int, seed: int, pairs: bool = False) -> Iterator[dict[str, Any]]:
    """A request and its answer for every story of at most `most` characters that has enough to ask for."""
    frequency = Counter(word for story in stories for word in set(WORD.findall(story)))
    common = max(2, len(stories) // 20)
    generator = np.random.default_rng(seed)
    for number, story in enumerate(stories):
        story = story.strip()
        sentences = sentences_of(story)
        if len(story) > most or len(sentences) < 4:
            continue
        words = sorted({w for w in WORD.findall(story) if 1 < frequency[w] <= common}) or WORD.findall(story)
        kind = KINDS[number % len(KINDS)]
        if kind == "words" and len(words) < 3:
            continue
        row = _request(kind, story, sentences, words, generator)
        if not pairs:
            asked = {"role": "user", "content": row["prompt"]}
            yield {"messages": [asked, {"role": "assistant", "content": row["chosen"]}]}
            continue
        other = stories[(number + 1) % len(stories)].strip()
        if row["chosen"] != other:
            yield {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in
                   (row | {"rejected": other[:most]}).items()}  # fmt: skip


def _request(
    kind: str, story: str, sentences: list[str], words: list[str], generator: np.random.Generator
) -> dict[str, str]:
    if kind == "words":
        one, two, three = (words[i] for i in sorted(generator.permutation(len(words))[:3]))
        return {"prompt": f"Tell a story with the words {one}, {two} and {three}.", "chosen": story}
    if kind == "begins":
        return {"prompt": f"Tell a story that begins with: {sentences[0]}", "chosen": story}
    end = story.index(sentences[len(sentences) // 2])
    return {"prompt": f"Go on: {story[:end].strip()}", "chosen": story[end:].strip()}


def obeys(prompt: str, answer: str) -> bool:
    """Whether an answer is what a request of `requests` asks for, as far as a program can see."""
    if words := re.fullmatch(r"Tell a story with the words (\w+), (\w+) and (\w+)\.", prompt):
        return all(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in words.groups())
    if prompt.startswith("Tell a story that begins with: "):
        return answer.strip().startswith(prompt.partition(": ")[2].strip())
    given = prompt.removeprefix("Go on: ")
    ends = re.search(r'[.!?]["\u201d]?$', answer.strip()) is not None
    return ends and answer.strip()[:40] not in given


def sentences_of(text: str) -> list[str]:
    """Its sentences, without what follows the last full stop."""
    return [found.group().strip() for found in _SENTENCE.finditer(text)]


def kind_of(prompt: str) -> str:
    """Which of `KINDS` a request is."""
    return "go on" if prompt.startswith("Go on: ") else "begins" if " begins with: " in prompt else "words"


def obedience(arguments: argparse.Namespace) -> dict[str, float]:
    """The share of requests of each kind that a model obeys."""
    from olmoe.engine.llm import LLM
    from olmoe.engine.sampling_params import SamplingParams

    lines = arguments.requests.read_text(encoding="utf-8").splitlines()[: arguments.count]
    prompts = [json.loads(line)["messages"][0]["content"] for line in lines]
    llm = LLM(arguments.model, adapter=arguments.adapter)
    params = SamplingParams(max_new_tokens=400, temperature=arguments.temperature, seed=0)
    answers = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params)
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for prompt, answer in zip(prompts, answers, strict=True):
        found[kind_of(prompt)].append(obeys(prompt, answer.text))
    return {kind: round(sum(kept) / len(kept), 3) for kind, kept in found.items() if kept}


if __name__ == "__main__":
    main()
