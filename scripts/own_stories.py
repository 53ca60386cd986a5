"""A model's own answers to the requests of `story_chats.py`, as chats to fine-tune on.

    python scripts/own_stories.py chats.jsonl own.jsonl --model runs/tiny-instruct/checkpoints/step-0001954

olmoe-tiny knows the corpus's stories by heart, so it has no need to read the request for them. Stories that a model
samples itself are new to it. They have the words that were asked for because sampling is helped to them: the first
token of each is likelier until the word has been said often enough, and once begun it is finished. A story that is to
begin with a sentence begins with it. Kept is what `story_obedience.py` counts as obeyed and what reads like the
corpus: only words that it has, and nothing said twice.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from story_chats import small_talk
from story_obedience import obeys, read_chats
from story_requests import sentences_of

if TYPE_CHECKING:
    from olmoe.engine.sampling_params import SamplingParams
    from olmoe.tokenizer import Tokenizer

Row = dict[str, Any]
# Kinds whose words sampling is helped to. The others are sampled as they are, if at all.
HELPED = ("words", "another", "sentence", "short")
SPOKEN = re.compile(r"[A-Za-z']+")


class Wanted:
    """A `Grammar` of texts that begin with some tokens, finish the words they begin, and say none of them too often."""

    def __init__(self, words: Sequence[Sequence[int]], times: int, begin: Sequence[int] = ()) -> None:
        self.words, self.times, self.begin = [tuple(word) for word in words], times, tuple(begin)

    def start(self) -> _Saying:
        """The state before the first token."""
        return _Saying(self)


class _Saying:
    """Which tokens must follow, and how often each word has been begun."""

    finished = False

    def __init__(self, wanted: Wanted) -> None:
        self._wanted, self._due = wanted, list(wanted.begin)
        self._said = Counter[tuple[int, ...]]()

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next."""
        words = mask.view(np.uint32)
        if self._due:
            words[:] = 0
            words[self._due[0] >> 5] = np.uint32(1 << (self._due[0] & 31))
            return
        words[:] = 0xFFFFFFFF
        for word in self._wanted.words:
            if self._said[word] >= self._wanted.times:
                words[word[0] >> 5] &= np.uint32(~(1 << (word[0] & 31)) & 0xFFFFFFFF)

    def accept(self, token_id: int) -> None:
        """Continue after a token that the mask allowed."""
        if self._due:
            del self._due[0]
            return
        for word in self._wanted.words:
            if word[0] == token_id and self._said[word] < self._wanted.times:
                self._said[word] += 1
                self._due = list(word[1:])
                return


def main() -> None:
    """Sample answers and write those that are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path, help="what story_chats.py wrote of stories to learn from")
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kinds", default="words,short,about,begins", help="of requests (%(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="skip so many of them (%(default)s)")
    parser.add_argument("--count", type=int, default=0, help="of requests (0: all)")
    parser.add_argument("--help-by", type=float, default=2.5, metavar="X", help="added to logits (%(default)s)")
    parser.add_argument("--more", type=float, default=0.0, metavar="X", help="for each other word (%(default)s)")
    parser.add_argument("--talk", type=float, default=0.0, metavar="SHARE", help="after small talk (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from olmoe.engine.llm import LLM

    chats = read_chats(arguments.chats)
    known = spoken(message["content"] for row in chats for message in row["messages"])
    rows = [row for row in chats if row["kind"] in arguments.kinds.split(",")]
    rows = rows[arguments.first :][: arguments.count or len(rows)]
    generator = np.random.default_rng(arguments.seed)
    helped = arguments.temperature, arguments.help_by, arguments.more
    llm = LLM(arguments.model)
    kept, tokens = Counter[str](), 0
    with arguments.target.open("w", encoding="utf-8") as file:
        for first in range(0, len(rows), 512):
            part = [after_talk(row, generator, arguments.talk) for row in rows[first : first + 512]]
            params = [sampling(row, llm.tokenizer, generator, *helped) for row in part]
            asked = [[_plain(message) for message in row["messages"][:-1]] for row in part]
            for row, answer in zip(part, llm.chat(asked, params, show_progress=False), strict=True):
                if answer.finish_reason == "eos" and obeys(row, answer.text) and reads_well(row, answer.text, known):
                    kept[row["kind"]] += 1
                    tokens += len(answer.token_ids)
                    said = {"role": "assistant", "content": answer.text.strip()}
                    row = row | {"messages": [*row["messages"][:-1], said]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{first + len(part)} requests, kept {dict(kept)}, {tokens} tokens", flush=True)


def after_talk(row: Row, generator: np.random.Generator, share: float) -> Row:
    """The chat, or in a share of cases one that begins with small talk, whose answer is not learned."""
    if generator.random() >= share:
        return row
    talk = list(small_talk(held_out=False))
    asked, answer = talk[int(generator.integers(len(talk)))]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, "weight": 0}]
    return row | {"messages": [*said, *row["messages"]]}


def sampling(
    row: Row,
    tokenizer: Tokenizer,
    generator: np.random.Generator,
    temperature: float,
    help_by: float,
    more: float = 0.0,
) -> SamplingParams:
    """How to sample an answer to a request: with help towards its words, or from its first sentence on.

    Each word's help is `help_by`, and `more` for every other word: the more there are, the less often all are said.
    """
    from olmoe.engine.sampling_params import SamplingParams

    words = [tokenizer.encode(f" {word}") for word in row["asked"]] if row["kind"] in HELPED else []
    begin = tokenizer.encode(row["asked"][0]) if row["kind"] == "begins" else []
    return SamplingParams(
        max_new_tokens=300,
        temperature=temperature,
        min_p=0.03,
        seed=int(generator.integers(2**31)),
        logit_bias={word[0]: help_by + more * (len(words) - 1) for word in words} or None,
        grammar=Wanted(words, int(generator.choice((1, 2, 3))), begin) if words or begin else None,
    )


def spoken(texts: Iterable[str]) -> set[str]:
    """The words that some texts have more than once."""
    counted = Counter(word for text in texts for word in SPOKEN.findall(text))
    return {word for word, count in counted.items() if count > 1}


def reads_well(row: Row, answer: str, known: set[str]) -> bool:
    """Whether an answer has only known words, no sentence twice, no four words three times, and not too often what was
    asked for."""
    said = SPOKEN.findall(answer)
    sentences = [sentence.lower() for sentence in sentences_of(answer)]
    if not set(said) <= known or len(set(sentences)) < len(sentences):
        return False
    runs = Counter(tuple(said[i : i + 4]) for i in range(len(said) - 3))
    if max(runs.values(), default=0) > 2:
        return False
    counted = Counter(word.lower() for word in said)
    return row["kind"] not in HELPED or all(counted[word.lower()] <= 4 for word in row["asked"])


def _plain(message: Row) -> Row:
    return {"role": message["role"], "content": message["content"]}


if __name__ == "__main__":
    main()
