"""Which tokens of a chat are trained: those that the assistant writes, the end of its text included.

They are found by the characters of the rendered text, never by comparing ids of a shorter text with those of a longer
one: a tokenizer may merge the end of a header with the start of an answer (OLMoE's does if that is a newline).
A token is trained if any of its characters belongs to an answer. The end of a text is identified by its id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from olmoe.errors import ConfigError, TokenizerError, shown
from olmoe.tokenizer import Tokenizer
from olmoe.train.finetune.chats import Completion, Conversation, Sample

IGNORE = -100
TURNS = ("all", "last")
TOO_LONG = ("cut", "drop", "refuse")
# Those that every chat may have; of others, only what the template writes can be learned from.
ROLES = ("system", "user", "assistant", "tool", "function")
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """What the network reads, and for each id the next one if that is trained, else `IGNORE`."""

    inputs: Ids
    labels: Ids

    @property
    def trained(self) -> int:
        """How many ids are predicted in training."""
        return int((self.labels != IGNORE).sum())

    def cut(self, length: int) -> Example:
        """The first `length` predictions."""
        return Example(self.inputs[:length], self.labels[:length])


@dataclass
class Count:
    """What became of the samples of a file."""

    samples: int = 0
    cut: int = 0
    dropped: int = 0


def make_example(sample: Sample, tokenizer: Tokenizer, turns: str = "all") -> Example:
    """The ids of a sample and which are trained: the answers of all `turns`, or that of the "last".

    Nothing follows the last id that is trained. Raises `ConfigError` if no token would be trained, or if an answer
    does not end as the model ends a text, for it would never learn to stop.
    """
    if isinstance(sample, Completion):
        ids, trained = _completion(sample, tokenizer)
    else:
        ids, trained = _conversation(sample, tokenizer, turns)
    last = max((i for i, is_trained in enumerate(trained) if is_trained), default=0)
    if last == 0:  # the first id has nothing to be predicted from
        raise ConfigError("no token of it would be trained; leave it out")
    labels = np.where(trained, ids, IGNORE)
    return Example(np.asarray(ids[:last], np.int64), labels[1 : last + 1].astype(np.int64))


def fit(example: Example, length: int, too_long: str) -> Example | None:
    """An example within `length` predictions, see `make_examples`; None where nothing that is trained is left.

    Raises `ConfigError` for one that is too long if that is to be refused.
    """
    if len(example.inputs) <= length:
        return example
    if too_long == "refuse":
        raise ConfigError(
            f"it has {len(example.inputs)} tokens, more than data.sequence_length {length}; raise that, or set "
            "data.too_long to cut or drop"
        )
    cut = example.cut(length if too_long == "cut" else 0)
    return cut if cut.trained else None


def make_examples(
    samples: Iterable[Sample], tokenizer: Tokenizer, *, length: int, turns: str, too_long: str, file: str
) -> tuple[list[Example], Count]:
    """The examples of a file's samples, of at most `length` predictions, and how many did not fit.

    What is `too_long` is "cut" behind the predictions that fit (and dropped if none of them is trained), "drop"ped
    whole, or "refuse"d. Raises `ConfigError`, with the number of the sample, for one that cannot be learned from, and
    if no example is left.
    """
    examples, count = [], Count()
    for number, sample in enumerate(samples, 1):
        count.samples += 1
        try:
            example = make_example(sample, tokenizer, turns)
            fitted = fit(example, length, too_long)
        except (ConfigError, TokenizerError) as error:
            raise ConfigError(f"Sample {number} of {file} cannot be learned from: {str(error).rstrip('.')}.") from None
        if fitted is None:
            count.dropped += 1
            continue
        count.cut += fitted is not example
        examples.append(fitted)
    if not examples:
        raise ConfigError(
            f"None of the {count.samples} samples of {file} has an answer within data.sequence_length {length}; "
            "raise that."
        )
    return examples, count


def _completion(sample: Completion, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids, offsets = tokenizer.encode_with_offsets(sample.prompt + sample.completion)
    trained = [end > len(sample.prompt) for _, end in offsets]
    if tokenizer.eos_ids:
        ids, trained = [*ids, tokenizer.eos_ids[0]], [*trained, True]
    return ids, trained


def _conversation(sample: Conversation, tokenizer: Tokenizer, turns: str) -> tuple[list[int], list[bool]]:
    text, spans = tokenizer.render_answers(sample.messages, tools=sample.tools)
    _check_roles(sample, text)
    ids, offsets = tokenizer.encode_with_offsets(text)
    trained = [False] * len(ids)
    for start, end in _chosen(sample, spans, turns):
        inside = [i for i, (first, behind) in enumerate(offsets) if first < end and behind > start]
        # What a template writes after an answer that it does not mark as the assistant's.
        following = inside[-1] + 1 if inside else next((i for i, (first, _) in enumerate(offsets) if first >= end), 0)
        if following < len(ids) and ids[following] in tokenizer.eos_ids:
            inside.append(following)
        if not inside or ids[inside[-1]] not in tokenizer.eos_ids:
            raise ConfigError(
                "the chat template writes no end of text after the assistant's answer, so the model would not learn to "
                "stop; use one that writes eos_token"
            )
        for i in inside:
            trained[i] = True
    return ids, trained


def _check_roles(sample: Conversation, text: str) -> None:
    """Refuse a role that the chat template does not know: answers would be trained without what they answer."""
    for message in sample.messages:
        role, content = message["role"], message["content"] or ""
        if role not in ROLES and content.strip() not in text:
            raise ConfigError(
                f"the chat template leaves out messages of the role {shown(role)}; use system, user or assistant, or a "
                "template that writes them"
            )


def _chosen(sample: Conversation, spans: list[tuple[int, int]], turns: str) -> list[tuple[int, int]]:
    """The answers that are trained."""
    answers = [
        trained for message, trained in zip(sample.messages, sample.trained, strict=True)
        if message["role"] == "assistant"
    ]  # fmt: skip
    if len(answers) != len(spans):
        raise ConfigError(
            f"the chat template writes {len(spans)} answers where the assistant has {len(answers)} messages"
        )
    chosen = [span for span, trained in zip(spans, answers, strict=True) if trained]
    return chosen if turns == "all" else [span for span in spans[-1:] if answers[-1]]
