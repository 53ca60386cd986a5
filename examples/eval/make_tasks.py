"""Write next_sentence.jsonl and pages.jsonl: tasks for `olmoe eval` from text that comes with olmoe.

    python examples/eval/make_tasks.py [TEXT.txt] [FOLDER]

TEXT has a line of `<|endoftext|>` between documents, and blank lines between paragraphs (left out: the held-out novels
that `olmoe quantize` measures on). The choices of a question are the sentence that comes next and three of other
documents that are about as long.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

QUESTIONS, CHOICES, PAGES = 50, 4, 20
LEAST = 40  # words of a context


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph."""
    found = re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)\s+(?=[A-Z])", " ".join(paragraph.split()))
    return [sentence for sentence in found if sentence]


def questions(documents: list[list[str]]) -> list[dict[str, object]]:
    """Questions one behind the other, as many as are wanted, spread over the text."""
    rng = random.Random(0)
    found = []
    for d, document in enumerate(documents):
        others = [sentence for other in documents[:d] + documents[d + 1 :] for sentence in other]
        context: list[str] = []
        for sentence in document:
            if len(" ".join(context).split()) < LEAST or not 6 <= len(sentence.split()) <= 30:
                context.append(sentence)
                continue
            alike = sorted(others, key=lambda other: (abs(len(other) - len(sentence)), other))
            choices = [*rng.sample(alike[:12], CHOICES - 1), sentence]
            rng.shuffle(choices)
            found.append({"context": " ".join(context), "choices": choices, "answer": choices.index(sentence)})
            context = []
    return [found[i * len(found) // QUESTIONS] for i in range(QUESTIONS)]


def main() -> None:
    """Read, choose, write."""
    here = Path(__file__).parent
    if len(sys.argv) > 1:
        text = Path(sys.argv[1]).read_text(encoding="utf-8")
    else:
        from olmoe.io.hub import SHIPPED

        text = (SHIPPED.parent / "text" / "held_out.txt").read_text(encoding="utf-8")
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else here
    documents = [document.split("\n\n") for document in text.split("<|endoftext|>")]
    paragraphs = [paragraph for document in documents for paragraph in document]
    rows = {
        "next_sentence": questions([[s for p in document for s in sentences(p)] for document in documents]),
        "pages": [{"text": " ".join(p.split())} for p in paragraphs if 60 <= len(p.split()) <= 300][:PAGES],
    }
    for name, lines in rows.items():
        out = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(out, encoding="utf-8")


if __name__ == "__main__":
    main()
