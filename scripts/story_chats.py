"""Chats for a small storyteller, written out of a corpus of stories.

    python scripts/story_chats.py ../shared/corpus/train/stories_tinystories.txt chats.jsonl --rounds 3
    python scripts/story_chats.py ../shared/corpus/valid/stories_tinystories.txt chats-valid.jsonl --held-out

`story_requests.py` makes one plain request of each story. This makes several of each, every round other ones in other
words, and what else is said in a chat: a story that goes on when it is asked to, another one after it, greetings, and
questions that a storyteller has no answer to. The answers are the corpus's stories, so whoever wrote them said what is
learned; but in most chats to learn from, names, things or adjectives are others, so that they are read in the request.
`story_obedience.py` measures how often a model does what they ask.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from story_phrases import (
    FUNCTION_WORDS,
    NO_THINGS,
    PHRASES,
    QUESTIONS,
    TALK,
    THANKS,
    UNKNOWN,
    WELCOME,
    YES,
)
from story_requests import WORD, sentences_of

from olmoe.io.documents import read_documents

Row = dict[str, Any]

# How often each kind is asked for, of a hundred requests.
KINDS = {"words": 36, "about": 18, "begins": 13, "go on": 12, "any": 3, "then": 4, "another": 8, "sentence": 8}
# Besides each of them, to learn from: one sentence, or a few.
SHORT = ("sentence", "sentence", "sentence", "sentence", "short", "short", "short")
_ARTICLE = r"\b([Aa]n?|the) "
_NOUN = re.compile(_ARTICLE + r"([a-z]{3,})(?=[.,!?]| (?:in|on|with|and|that|who|from|near|under|was|to)\b)")
_AFTER_ARTICLE = re.compile(_ARTICLE + r"([a-z]{3,})\b")
_BEING = re.compile(
    r"\bthere (?:was|lived) (an? (?:[a-z]+ ){0,2}[a-z]{3,})(?= (?:who|that|in|with|and|named|called)\b|[.,])"
)
_ADJECTIVE = re.compile(_ARTICLE + r"([a-z]{3,}) ([a-z]{3,})\b")
_NAMED = re.compile(r"\b(an? (?:[a-z]+ ){0,2}([a-z]{3,})),? (?:named|called) ([A-Z][a-z]+)\b")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
_BEGINNING = re.compile(
    r"(?!(?:They|He|She|So|But|And|Then|The) )"
    r"(?:Once|One|There|In |It was|Long|[A-Z][a-z]+ (?:and|was|had|lived|liked|loved|went|wanted)\b)"
)
_GIRLS, _BOYS = {"girl", "lady", "woman", "mother", "princess"}, {"boy", "man", "prince", "king"}
_PEOPLE = _GIRLS | _BOYS | {"mom", "dad", "mommy", "daddy", "mum", "child", "person", "family"}


def main() -> None:
    """Write chats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="stories, divided by lines of <|endoftext|>")
    parser.add_argument("target", type=Path)
    parser.add_argument("--rounds", type=int, default=1, help="requests of each story (%(default)s)")
    parser.add_argument("--most", type=int, default=1200, metavar="CHARACTERS", help="of a story (%(default)s)")
    parser.add_argument("--held-out", action="store_true", help="to measure with: names as they are, other small talk")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stories = [story.strip() for story in read_documents(arguments.stories) if isinstance(story, str)]
    rows = list(chats(stories, arguments.rounds, arguments.most, arguments.seed, arguments.held_out))
    arguments.target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} chats of {len(stories)} stories: {dict(Counter(row['kind'] for row in rows))}")


class Writer:
    """Requests for the stories of one corpus: which words and names are worth asking for, and chance."""

    def __init__(self, stories: Sequence[str], seed: int, held_out: bool) -> None:
        self.random, self.held_out = np.random.default_rng(seed), held_out
        frequency = Counter(word for story in stories for word in set(WORD.findall(story)))
        most = max(2, len(stories) // 8)  # words of more stories than that say nothing of one
        self.asked_for = {word for word, count in frequency.items() if 1 < count <= most} - FUNCTION_WORDS
        self.rare = {word for word, count in frequency.items() if count <= len(stories) // 20}
        text = "\n".join(stories)
        ends, all_ = (Counter(found[2] for found in p.finditer(text)) for p in (_NOUN, _AFTER_ARTICLE))
        # An adjective stands before its noun more often than not.
        nouns = {word for word, count in ends.items() if count > 1 and count > 0.6 * all_[word]}
        nouns = {noun for noun in nouns if re.search("[^s]s$", noun) is None} - FUNCTION_WORDS - NO_THINGS
        beings = {noun for _, noun, _ in _NAMED.findall(text)} | {
            being.rpartition(" ")[2] for being in _BEING.findall(text)
        }
        self.nouns = nouns
        adjectives = Counter(found[2] for found in _ADJECTIVE.finditer(text) if found[3] in nouns)
        common = {word for word, count in adjectives.items() if count > 2 and count > 0.6 * all_[word]}
        self.adjectives = (common & self.asked_for) - nouns
        self.classes = [sorted((nouns & beings) - _PEOPLE), sorted(nouns - beings - _PEOPLE), sorted(self.adjectives)]
        named = {(noun, name) for story in stories for _, noun, name in _NAMED.findall(story)}
        self.names = [sorted({name for noun, name in named if noun in kind}) for kind in (_GIRLS, _BOYS)]

    def pick(self, choices: Sequence[Any]) -> Any:
        """One of them."""
        return choices[int(self.random.integers(len(choices)))]

    def phrase(self, kind: str, *filling: str) -> str:
        """A request in one of the ways to say it, sometimes as carelessly as people write."""
        text = str(self.pick(PHRASES[kind])).format(*filling)
        if kind in ("begins", "go on") or self.random.random() > 0.15:
            return text
        return (text[0].lower() + text[1:]).rstrip(".")

    def varied(self, story: str, most: int = 2) -> tuple[str, list[str]]:
        """The story with another name for its girl or boy, and other words in place of up to `most`; and those words.

        Things, animals and adjectives are exchanged for any of their kind, and names half of the time; nothing where
        stories are held out. What is asked for can so be known from the request alone, also by a model that knows the
        story by heart.
        """
        if self.held_out:
            return story, []
        found = _NAMED.search(story)
        if found is not None and self.random.random() < 0.5:
            names = next((self.names[i] for i, kind in enumerate((_GIRLS, _BOYS)) if found[2] in kind), [])
            name = self.pick(names) if names else found[3]
            story = story if name in story else re.sub(rf"\b{found[3]}\b", name, story)
        here = {noun[2] for noun in _NOUN.finditer(story)} & self.nouns - _PEOPLE
        here |= {found[2] for found in _ADJECTIVE.finditer(story)} & self.adjectives
        order = sorted(here)
        new: list[str] = []
        for i in self.random.permutation(len(order))[: int(self.random.integers(most + 1))]:
            story = self._exchanged(story, order[i], new)
        return story, new

    def _exchanged(self, story: str, old: str, new: list[str]) -> str:
        """The story with a word like `old` in its place, which is added to `new`; as it is if it has that already."""
        word = str(self.pick(next(kind for kind in self.classes if old in kind)))
        if re.search(rf"\b{word}", story) or any(other in old for other in new):
            return story
        new.append(word)
        article = rf"\1{'n' if word[0] in 'aeiou' else ''} {word}"
        story = re.sub(rf"\b(a)n? {old}\b", article, story, flags=re.IGNORECASE)
        return re.sub(rf"\b{old}(?=s?\b)", word, story)

    def words(self, story: str, new: Sequence[str] = ()) -> tuple[str, list[str]]:
        """Some words of a story as people list them, `new` ones first of all; empty if it has too few.

        To learn from, of a story's first half: a model that waits for a word's turn must remember it for long.
        """
        new = [word for word in new if _holds(story, word)]
        if not self.held_out:
            sentences = sentences_of(story)
            story = " ".join(sentences[: max(4, len(sentences) // 2)])
        found = {word for word in WORD.findall(story) if word in self.asked_for} - set(new)
        nouns = sorted(found & self.nouns)
        count = int(self.pick((1, 2, 2, 3, 3, 3, 3)))
        if len(found) + len(new) < count:
            return "", []
        order = [nouns[i] for i in self.random.permutation(len(nouns))[: (count + 1) // 2]]
        rest = sorted(found - set(order))
        order = [*new, *order] + [rest[i] for i in self.random.permutation(len(rest))]
        chosen = [order[i] for i in self.random.permutation(count)]
        if count == 1:
            return chosen[0], chosen
        last = self.pick((" and ", " and ", " and ", ", ", ", and " if count == 3 else " and "))
        return ", ".join(chosen[:-1]) + last + chosen[-1], chosen

    def topic(self, story: str, new: Sequence[str] = ()) -> tuple[str, list[str]]:
        """Whom or what a story is about, and the words that must be in it; empty if that cannot be seen."""
        beginning = story[:250]
        options: list[tuple[str, list[str]]] = []
        if found := _NAMED.search(beginning):
            whole, noun, name = found.groups()
            options += [(f"{whole} {self.pick(('named', 'named', 'called'))} {name}", [noun, name])] * 3
            options += [(whole, [noun]), (name if noun in _PEOPLE else f"{name} the {noun}", [name])]
        if found := _BEING.search(beginning):
            options += [(found[1], [found[1].rpartition(" ")[2]])] * 2
        things = [word for word in new if word in self.nouns and _holds(story, word)] or sorted(
            {found[2] for found in _NOUN.finditer(story)} & self.nouns & self.asked_for
        )
        if things:
            thing = self.pick(things)
            options += [(("an " if thing[0] in "aeiou" else "a ") + thing, [thing])] * 2
        return self.pick(options) if options else ("", [])

    def request(self, kind: str, story: str, new: Sequence[str] = ()) -> Row:
        """One request for a whole story or, if it does not lend itself to the kind, for any."""
        prefix = "another" if kind == "another" else ""
        if prefix:
            kind = self.pick(("words", "about", "any"))
        text, asked = "", list[str]()
        if kind in ("words", "about"):
            text, asked = self.words(story, new) if kind == "words" else self.topic(story, new)
        if not asked:
            kind = "any"
        if prefix:
            phrase = {"words": "another with", "about": "another about", "any": "another"}[kind]
        else:
            phrase = "word" if kind == "words" and len(asked) == 1 else kind
        if phrase == "another with" and len(asked) == 1:
            phrase = "another with one"
        return {
            "kind": prefix or kind,
            "asked": asked,
            "messages": [_user(self.phrase(phrase, text)), _assistant(story)],
        }


def chats(stories: Sequence[str], rounds: int, most: int, seed: int, held_out: bool) -> Iterator[Row]:
    """So many chats of every story of at most `most` characters, in rounds, and small talk between them."""
    writer = Writer(stories, seed, held_out)
    fitting = [story for story in stories if len(story) <= most and _is_whole(story)]
    kinds, weights = list(KINDS), np.array(list(KINDS.values())) / sum(KINDS.values())
    talk = list(small_talk(held_out))
    for _ in range(rounds):
        for number in writer.random.permutation(len(fitting)):
            kind = kinds[int(writer.random.choice(len(kinds), p=weights))]
            other = int(writer.random.integers(len(fitting)))
            yield _chat(writer, kind, fitting[number], fitting[other - (other == number)])
            if held_out:
                continue
            # Short ones besides: of all their tokens more are read in the request.
            for short in SHORT:
                yield from _excerpt(writer, short, writer.pick(stories))
            if writer.random.random() < 0.06:
                yield _talk(writer, *writer.pick(talk))
    if held_out:
        for number in writer.random.permutation(len(fitting))[: len(fitting) // 8]:
            yield from _excerpt(writer, "short", fitting[number])
        yield from (_talk(writer, *each) for each in talk)


def _chat(writer: Writer, kind: str, story: str, other: str) -> Row:
    """A chat whose last answer is a story, the rest of one, or a sentence."""
    if kind == "sentence":
        for row in _excerpt(writer, kind, story):
            return row
        kind = "words"
    story, new = writer.varied(story)
    sentences = sentences_of(story)
    if kind == "begins":
        asked = _user(writer.phrase(kind, sentences[0]))
        return {"kind": kind, "asked": [sentences[0]], "messages": [asked, _assistant(story)]}
    if kind in ("go on", "then"):
        return _continued(writer, kind, story, sentences)
    row = writer.request(kind, story, new)
    if kind == "another":
        if len(story) + len(other) > 1600:  # more than the context holds
            other = " ".join(sentences_of(other)[:4])
        before = writer.request(writer.pick(("words", "about", "any")), other)["messages"]
        before[1]["weight"] = 0
        if row["asked"] == [] and writer.random.random() < 0.5:
            before += [_user(writer.pick(THANKS)), _assistant(WELCOME)]
            row["messages"][0] = _user(writer.pick(YES))
        row["messages"] = before + row["messages"]
    return row


def _excerpt(writer: Writer, kind: str, story: str) -> Iterator[Row]:
    """A request for one sentence with some words, or a few that follow one another; none if the story has no such."""
    sentences = sentences_of(story)
    if kind == "sentence":
        options = [s for s in sentences if '"' not in s and 6 <= len(s.split()) <= 25]
    else:
        length = int(writer.random.integers(2, 5))
        first = range(len(sentences) - length + 1 if writer.random.random() < 0.5 else 1)
        options = [" ".join(sentences[i : i + length]) for i in first]
        options = [text for text in options if text[:1].isupper() and '"' not in text and len(text) < 300]
    text, new = writer.varied(writer.pick(options) if options else "")
    listed, asked = writer.words(text, new)
    if asked:
        phrase = "short word" if kind == "short" and len(asked) == 1 else kind
        yield {
            "kind": kind,
            "asked": asked,
            "messages": [_user(writer.phrase(phrase, listed)), _assistant(text)],
        }


def _continued(writer: Writer, kind: str, story: str, sentences: list[str]) -> Row:
    """A story up to a sentence, given or told before, and the rest of it."""
    cut = int(writer.random.integers(2, max(3, (3 * len(sentences)) // 4)))
    end = story.index(sentences[cut], sum(map(len, sentences[:cut])))
    given, rest = story[:end].strip(), story[end:].strip()
    names = sorted(set(_NAME.findall(given))) or sorted(set(WORD.findall(given)) & writer.rare)
    row: Row = {"kind": kind, "asked": names}
    if kind == "go on":
        return row | {"messages": [_user(writer.phrase(kind, given)), _assistant(rest)]}
    first = writer.request(writer.pick(("words", "about", "any")), story)["messages"][0]
    # The half is not learned, or stories would stop there.
    told = _assistant(given) | {"weight": 0}
    return row | {"messages": [first, told, _user(writer.phrase(kind)), _assistant(rest)]}


def _is_whole(story: str) -> bool:
    """Whether it is a story from its beginning on: the corpus has fragments as well."""
    return len(sentences_of(story)) >= 4 and _BEGINNING.match(story) is not None


def small_talk(held_out: bool) -> Iterator[tuple[str, str]]:
    """What else people say to a storyteller, and what it answers; other sayings where it is held out."""
    for learned, measured, answer in TALK:
        yield from ((asked, answer) for asked in (measured if held_out else learned))
    for question, fillings in QUESTIONS:
        fill = [part.strip() for part in fillings.split("|")[held_out].split(", ")]
        if question.count("{}") == 2:
            pairs = [question.format(a, b) for a in fill for b in fill if a != b]
            yield from ((asked, UNKNOWN) for asked in (pairs[:2] if held_out else pairs[::3]))
        else:
            yield from ((question.format(each), UNKNOWN) for each in fill)


def _holds(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def _talk(writer: Writer, asked: str, answer: str) -> Row:
    if not writer.held_out and writer.random.random() < 0.2:
        asked = asked.lower().rstrip(".?!")
    return {"kind": "talk", "asked": ["stories"], "messages": [_user(asked), _assistant(answer)]}


def _user(text: str) -> Row:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


if __name__ == "__main__":
    main()
