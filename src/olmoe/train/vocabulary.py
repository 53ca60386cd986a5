"""Train a byte-level BPE tokenizer with OLMoE's conventions for ids, at any size.

OLMoE's vocabulary (GPT-NeoX's for Dolma) begins with `|||IP_ADDRESS|||` (0) and `<|padding|>` (1), ends
with runs of 24 down to 2 spaces, `|||EMAIL_ADDRESS|||`, `|||PHONE_NUMBER|||` and `<|endoftext|>`, and has
the merges between. A vocabulary of another size keeps that order, so that code written for one works for
the other.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from olmoe.errors import ConfigError
from olmoe.io.atomic import write_text

FIRST = ("|||IP_ADDRESS|||", "<|padding|>")
SPACES = tuple(" " * n for n in range(24, 1, -1))
LAST = ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "<|endoftext|>")
# Characters of the longest word that merges are learned from; longer ones are cut.
LONGEST = 4096
# What the byte-level pattern takes for one word, at the least: letters, digits, other signs, or white space.
_LONG_RUN = re.compile(rf"[^\W_]{{{LONGEST + 1},}}|(?:[^\w\s]|_){{{LONGEST + 1},}}|\s{{{LONGEST + 1},}}")
_RESERVED = len(FIRST) + len(SPACES) + len(LAST)


def train_vocabulary(documents: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Train on `documents` and write a `tokenizer.json` of exactly `vocab_size` ids to `path`, atomically.

    Raises `ConfigError` if the size leaves no room for the 256 bytes, or the text yields too few merges.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < _RESERVED + 256:
        raise ConfigError(f"A byte-level vocabulary needs at least {_RESERVED + 256} entries, not {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPACES) - len(LAST),
        special_tokens=list(FIRST),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _interruptible(lambda: tokenizer.train_from_iterator(chain.from_iterable(map(_cut, documents)), trainer))
    tokenizer.add_tokens([AddedToken(run, normalized=True, special=False) for run in SPACES])
    tokenizer.add_tokens([AddedToken(name, normalized=True, special=False) for name in LAST[:2]])
    tokenizer.add_special_tokens([AddedToken(LAST[2], normalized=False, special=True)])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"The text yields only {tokenizer.get_vocab_size()} vocabulary entries, not {vocab_size}; "
            "give more text or a smaller vocab_size."
        )
    contents = json.loads(tokenizer.to_str())
    contents["decoder"]["add_prefix_space"] = False  # as in OLMoE's file; the constructor has no such argument
    for token in contents["added_tokens"]:
        # The trainer makes its first tokens special; OLMoE's masks of personal data are ordinary tokens.
        token["special"] = token["content"] in (FIRST[1], LAST[2])
        token["normalized"] = not token["special"]
    write_text(path, json.dumps(contents, ensure_ascii=False, indent=1))


def _cut(document: str) -> Iterator[str]:
    """The document in parts, cut within words of more than `LONGEST` characters.

    The time for a word grows with the square of its length; such words are data, and teach no merges that their
    parts do not.
    """
    start = 0
    for run in _LONG_RUN.finditer(document):
        for end in range(run.start() + LONGEST, run.end(), LONGEST):
            yield document[start:end]
            start = end
    yield document[start:]


def _interruptible(work: Callable[[], object]) -> None:
    """Do `work`, during which Python handles no signals, in another thread, so that Ctrl-C still ends it."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised in the waiting thread
            failures.append(error)

    # A daemon, because after an interrupt nothing joins it.
    thread = threading.Thread(target=run, name="vocabulary", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failures:
        raise failures[0]
