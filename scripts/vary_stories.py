"""Variants of a small corpus's stories, for a model that would otherwise learn the stories by heart.

    python scripts/vary_stories.py ../shared/corpus/train/stories_tinystories.txt varied.txt --variants 10

In each variant of a story, people and animals have other names and some words are exchanged, consistently from
beginning to end. What takes a word's place has its ending and occurs between the same words elsewhere in the corpus;
frequent words and names are chosen more often. So they stay about as frequent as they are, but what comes next cannot
be recited. A variant need not make sense. It remains the text of the corpus's authors, under its licence.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from story_phrases import FUNCTION_WORDS

from olmoe.io.documents import SEPARATOR, read_documents

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|[.,!?\"]")
_LOWER = re.compile(r"(?<![\w'-])[a-z]{3,}(?![\w'-])")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
_SHE, _HE = re.compile(r"\b(?:[Ss]he|[Hh]er)\b"), re.compile(r"\b(?:[Hh]e|[Hh]is|[Hh]im)\b")
# Words that a story is built of rather than about: exchanging them would break its grammar.
_KEPT = FUNCTION_WORDS | set(
    "one two three day time very too not but was were are has had have did does can could would will should may must "
    "all any some each every both other another more most much many who what when where why how there here that this "
    "these those they them their she her hers his him you your our its than then with from for and the into onto about "
    "after before because while until again away back out off over under down just only also even still never always "
    "end once upon ever lived being been came went said asked told "
    # Other words agree with their sex or number.
    "girl boy girls boys man woman men women lady mom dad mommy daddy mum mother father family friend friends people "
    "grandma grandpa brother sister child children".split()
)
_FORM = re.compile(r"(?:ed|ing|ly|est|er|(?<!s)s)$")


def main() -> None:
    """Write variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="stories, divided by lines of <|endoftext|>")
    parser.add_argument("target", type=Path)
    parser.add_argument("--variants", type=int, default=10, help="of each story (%(default)s)")
    parser.add_argument("--share", type=float, default=0.25, help="of a story's words that are others (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stories = [story.strip() for story in read_documents(arguments.stories) if isinstance(story, str)]
    with arguments.target.open("w", encoding="utf-8") as file:
        for story in variants(stories, arguments.variants, arguments.share, arguments.seed):
            file.write(f"{story}\n{SEPARATOR}\n")
    print(f"{arguments.variants} variants of {len(stories)} stories")


def variants(stories: Sequence[str], count: int, share: float, seed: int) -> Iterator[str]:
    """So many variants of every story, in rounds, the stories of each round in another order."""
    words, names = Words(stories), Names(stories)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        for number in generator.permutation(len(stories)):
            yield words.varied(names.varied(stories[number], generator), share, generator)


class Names:
    """Who occurs in the stories of a corpus, and how often: girls, boys, and those who are neither or both."""

    def __init__(self, stories: Sequence[str]) -> None:
        found = Counter(name for story in stories for name in _NAME.findall(story))
        lower = Counter(word for story in stories for word in set(_LOWER.findall(story)))
        found = Counter({name: n for name, n in found.items() if n > 2 and lower[name.lower()] == 0})
        she, he = Counter[str](), Counter[str]()
        for story in stories:
            for match in _NAME.finditer(story):
                after = story[match.end() : match.end() + 80]
                she[match[0]] += len(_SHE.findall(after))
                he[match[0]] += len(_HE.findall(after))
        self._kind = {name: 0 if she[name] > 2 * he[name] else 1 if he[name] > 2 * she[name] else 2 for name in found}
        self._names = [[name for name in found if self._kind[name] == kind] for kind in range(3)]
        counts = [np.array([found[name] for name in names], float) for names in self._names]
        self._weights = [count / count.sum() if len(count) else count for count in counts]

    def varied(self, story: str, generator: np.random.Generator) -> str:
        """The story with other names of the same kind, drawn as often as they occur."""
        here = sorted(set(_NAME.findall(story)) & self._kind.keys())
        new: dict[str, str] = {}
        for name in here:
            kind = self._kind[name]
            other = str(generator.choice(self._names[kind], p=self._weights[kind]))
            if other not in story and other not in new.values():
                new[name] = other
        return _exchanged(story, new)


class Words:
    """The words of a corpus that occur `least` times and, for each, the `alike` ones that stand between the same words.

    Words of another form (`jump`, `jumped`), or of the same beginning, are not alike.
    """

    def __init__(self, stories: Sequence[str], least: int = 12, alike: int = 10, contexts: int = 1500) -> None:
        counts = Counter(word for story in stories for word in _LOWER.findall(story))
        self._words = sorted(word for word, n in counts.items() if n >= least and word not in _KEPT)
        self._place = {word: i for i, word in enumerate(self._words)}
        self._counts = np.array([counts[word] for word in self._words], float)
        vectors = self._vectors(stories, contexts)
        similarity = vectors @ vectors.T if len(self._words) else np.zeros((0, 0), np.float32)
        forms = np.array([(*_FORM.findall(word), "")[0] for word in self._words])
        stems = np.array([word[:3] for word in self._words])
        similarity[(forms[:, None] != forms) | (stems[:, None] == stems)] = 0
        self._alike = np.argsort(-similarity, axis=1)[:, :alike]
        chosen = np.take_along_axis(similarity, self._alike, axis=1).clip(0)
        chosen = np.where(chosen < 0.6 * chosen.max(axis=1, keepdims=True, initial=0), 0, chosen) ** 4
        weights = chosen * np.sqrt(self._counts)[self._alike]
        self._weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)

    def _vectors(self, stories: Sequence[str], contexts: int) -> npt.NDArray[np.float32]:
        """What stands one and two places before and after each word, weighted by how much that says of it."""
        texts = [[w.lower() for w in _WORD.findall(story)] for story in stories]
        common = {
            word: i for i, (word, _) in enumerate(Counter(w for text in texts for w in text).most_common(contexts))
        }
        table = np.zeros((len(self._words), 4 * len(common)), np.float32)
        for text in texts:
            context = [common.get(word, -1) for word in text]
            for i, word in enumerate(text):
                place = self._place.get(word)
                if place is None:
                    continue
                for side, j in enumerate((i - 2, i - 1, i + 1, i + 2)):
                    if 0 <= j < len(text) and context[j] >= 0:
                        table[place, side * len(common) + context[j]] += 1
        whole = max(float(table.sum()), 1.0)
        expected = table.sum(axis=1, keepdims=True) @ table.sum(axis=0, keepdims=True) / whole
        information = np.log(np.maximum(table, 1e-9) / np.maximum(expected, 1e-9)).clip(0)
        information[:, len(common) : 3 * len(common)] *= 2  # neighbours say more than those beyond them
        norm = np.linalg.norm(information, axis=1, keepdims=True)
        return (information / np.maximum(norm, 1e-9)).astype(np.float32)

    def alike(self, word: str) -> list[str]:
        """What may stand in its place, the likeliest first."""
        place = self._place.get(word)
        if place is None:
            return []
        order = np.argsort(-self._weights[place])
        return [self._words[self._alike[place, i]] for i in order if self._weights[place, i] > 0]

    def varied(self, story: str, share: float, generator: np.random.Generator) -> str:
        """The story with others in place of about this share of its different words."""
        here = sorted(set(_LOWER.findall(story)) & self._place.keys())
        new: dict[str, str] = {}
        for word in here:
            if generator.random() >= share:
                continue
            place = self._place[word]
            if self._weights[place].sum() < 0.5:
                continue
            other = self._words[generator.choice(self._alike[place], p=self._weights[place])]
            if not re.search(rf"\b{other}\b", story) and other not in new.values():
                new[word] = other
        return _exchanged(story, new)


def _exchanged(story: str, new: dict[str, str]) -> str:
    """The story with these words in place of those, all at once, and `a` or `an` before them as it must be."""
    if not new:
        return story
    listed = "|".join(sorted(map(re.escape, new), key=len, reverse=True))

    def other(match: re.Match[str]) -> str:
        article, word = match[1] or "", new[match[2]]
        if article:
            article = article[0] + ("n " if word[0] in "aeiou" else " ")
        return article + word

    return re.sub(rf"(?<![\w'-])((?:[Aa]|[Aa]n) )?\b({listed})(?![\w-])", other, story)


if __name__ == "__main__":
    main()
