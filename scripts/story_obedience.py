"""How often a model does what the chats of `story_chats.py` ask.

    python scripts/story_obedience.py chats-valid.jsonl --model olmoe-tiny-instruct
    python scripts/story_obedience.py chats-valid.jsonl --answers stories

Counted is what a program can see, on answers that came to their end by themselves: see `obeys`. `--answers stories`
measures other requests' stories in place of a model's, which says what comes by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from story_requests import sentences_of

Row = dict[str, Any]


def main() -> None:
    """Measure, and show some answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--model", help="a checkpoint, or ...")
    parser.add_argument("--answers", choices=("stories",), help="... stories at random in place of a model")
    parser.add_argument("--count", type=int, default=0, help="of requests (0: all)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print so many answers")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.answers is None):
        parser.error("give --model or --answers")
    rows = read_chats(arguments.chats)
    rows = rows[: arguments.count or len(rows)]
    answers = strangers(rows) if arguments.answers else ask(rows, arguments.model, arguments.temperature)
    for row, (answer, _) in list(zip(rows, answers, strict=True))[: arguments.show]:
        print(f"[{row['kind']}] {row['messages'][-2]['content']}\n  -> {answer}\n  {obeys(row, answer)}")
    print(json.dumps(summary(rows, answers)))


def read_chats(path: Path) -> list[Row]:
    """The rows of a file of `story_chats.py`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def obeys(row: Row, answer: str) -> bool:
    """Whether an answer is what was asked for, as far as a program can see.

    words, about, another: every word that was asked for, the noun and the name are in it, and another story is another
    one; begins: it begins with the sentence, letter by letter; go on, then: it takes up a name of the given part (or a
    rare word, where there are no names) and does not repeat it; sentence: the words are in it, and it is one; short:
    the words are in it, and it has two to six sentences; talk: it speaks of stories, and tells none. All but talk end
    with a whole sentence.
    """
    kind, asked, answer = row["kind"], row["asked"], answer.strip()
    if kind == "talk":
        return "stories" in answer and len(answer.split()) < 40
    if not re.search(r'[.!?]["\u201d]?$', answer):
        return False
    if kind == "sentence":
        return all(_holds(answer, word) for word in asked) and len(sentences_of(answer)) == 1
    if kind == "short":
        return all(_holds(answer, word) for word in asked) and 2 <= len(sentences_of(answer)) <= 6
    if kind == "begins":
        return answer.startswith(asked[0])
    goes_on = kind in ("go on", "then")
    before = " ".join(message["content"] for message in row["messages"][:-1])
    if answer[: 40 if goes_on else 120] in before:  # many stories have their first words in common
        return False
    if goes_on:
        return any(_holds(answer, word) for word in asked)
    return all(_holds(answer, word) for word in asked) and len(sentences_of(answer)) >= 3


def ask(rows: Sequence[Row], model: str, temperature: float) -> list[tuple[str, bool]]:
    """A model's answers, and whether they came to their end by themselves."""
    from olmoe.engine.llm import LLM
    from olmoe.engine.sampling_params import SamplingParams

    llm = LLM(model)
    params = SamplingParams(max_new_tokens=400, seed=0, temperature=temperature)
    answers = llm.chat([[_plain(message) for message in row["messages"][:-1]] for row in rows], params)
    return [(answer.text, answer.finish_reason == "eos") for answer in answers]


def strangers(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """For each request the answer of the one half a list away."""
    return [(rows[(i + len(rows) // 2) % len(rows)]["messages"][-1]["content"], True) for i in range(len(rows))]


def summary(rows: Sequence[Row], answers: Sequence[tuple[str, bool]]) -> Row:
    """Of each kind how many requests there were, the share that was obeyed, and its 95 % interval (Wilson's).

    "all requests" is without talk and without the short stories, which were asked for later than the rest: so it
    remains comparable with what was measured before.
    """
    found: dict[str, list[bool]] = {}
    single: list[bool] = []
    for row, (answer, ended) in zip(rows, answers, strict=True):
        found.setdefault(row["kind"], []).append(ended and obeys(row, answer))
        if row["kind"] == "words":
            single += [_holds(answer, word) for word in row["asked"]]
    kinds = {kind: _share(kept) for kind, kept in sorted(found.items())}
    requests = [each for kind, kept in found.items() if kind not in ("talk", "short") for each in kept]
    ended = [end for _, end in answers]
    return {"kinds": kinds, "all requests": _share(requests), "single words": _share(single), "ended": _share(ended)}


def _share(kept: Sequence[bool]) -> Row:
    n, z = len(kept), 1.96
    if n == 0:
        return {"n": 0}
    p = sum(kept) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"n": n, "obeyed": round(p, 3), "interval": [max(0.0, round(low, 3)), round(high, 3)]}


def _holds(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _plain(message: Row) -> Row:
    return {"role": message["role"], "content": message["content"]}


if __name__ == "__main__":
    main()
