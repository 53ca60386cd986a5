"""Preferences to learn from: two answers, one of them better, or single answers that are good or bad. No torch.

A file is JSONL or JSON, as in `chats`. Each object has

- `prompt`, `chosen` and `rejected`: texts, or lists of messages. `chosen` and `rejected` may bring the whole chat; then
  `prompt` may be missing, and what the two begin with in common is the prompt.
- for KTO: `prompt`, `completion` and `label`, true where the answer is desirable. Pairs are taken as two of these.

Texts stay without a chat template unless the source says `chat = true`, or one of the three is a list of messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError, shown
from olmoe.train.finetune.chats import Completion, Message, Sample, as_messages, conversation, read_rows


@dataclass(frozen=True)
class Pair:
    """Two samples with the same prompt."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True)
class Judged:
    """A sample whose answer is wanted, or is not."""

    sample: Sample
    desirable: bool


def read_pairs(path: Path, *, chat: bool = False) -> Iterator[Pair]:
    """The pairs of a file. Raises `ConfigError`, with the line, for anything else."""
    for where, value in read_rows(path):
        yield _pair(value, where, chat)


def read_judged(path: Path, *, chat: bool = False) -> Iterator[Judged]:
    """The single answers of a file, of pairs both. Raises `ConfigError`, with the line, for anything else."""
    for where, value in read_rows(path):
        if "label" in value:
            yield _judged(value, where, chat)
            continue
        pair = _pair(value, where, chat)
        yield Judged(pair.chosen, True)
        yield Judged(pair.rejected, False)


def _judged(value: dict[str, Any], where: str, chat: bool) -> Judged:
    label, prompt, answer = value["label"], value.get("prompt"), value.get("completion", value.get("response"))
    if label not in (True, False):
        raise ConfigError(f"{where} has the label {shown(label)}; use true or false.")
    if prompt is None or answer is None:
        raise ConfigError(f'{where} needs "prompt" and "completion" beside its label.')
    return Judged(_sample(prompt, answer, where, chat), bool(label))


def _pair(value: dict[str, Any], where: str, chat: bool) -> Pair:
    prompt, chosen, rejected = (value.get(key) for key in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        raise ConfigError(f'{where} needs "chosen" and "rejected", but has the keys {shown(sorted(value))}.')
    if prompt is None:
        prompt, chosen, rejected = _split(chosen, rejected, where)
    pair = Pair(*(_sample(prompt, answer, where, chat) for answer in (chosen, rejected)))
    if pair.chosen == pair.rejected:
        raise ConfigError(f"{where} has the same answer as chosen and as rejected.")
    return pair


def _sample(prompt: Any, answer: Any, where: str, chat: bool) -> Sample:
    if isinstance(prompt, str) and isinstance(answer, str) and not chat:
        return Completion(prompt, answer)
    before, after = as_messages(prompt, "user", where), as_messages(answer, "assistant", where)
    if len(after) > 1 and after[: len(before)] == before:
        after = after[len(before) :]  # the whole chat was given, prompt included
    if after[-1]["role"] != "assistant":
        raise ConfigError(f"{where} has an answer that does not end with the assistant's message.")
    messages: list[Message] = [dict(message) for message in before + after]
    # The assistant's messages in the prompt are not part of the answer.
    return replace(
        conversation(messages, where), trained=(*(False for _ in before), *(m["role"] == "assistant" for m in after))
    )


def _split(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """The prompt that two whole chats, or texts, have in common, and how each goes on."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        raise ConfigError(f'{where} needs the "prompt" of its texts.')
    one, other = (as_messages(answer, "assistant", where) for answer in (chosen, rejected))
    shared = 0
    while shared < min(len(one), len(other)) - 1 and one[shared] == other[shared]:
        shared += 1
    if shared == 0:
        raise ConfigError(f'{where} needs a "prompt", or the same first messages in both answers.')
    return one[:shared], one[shared:], other[shared:]
