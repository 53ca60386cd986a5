"""Chats to learn from, in the usual formats. No torch.

A file is JSONL (one object per line) or JSON (a list of objects). Each object is one sample; its keys show the format:

- `messages`: OpenAI's, with `role` and `content`; an assistant's message with `weight` 0 is not trained. `tools` beside
  them go to the chat template.
- `conversations`: ShareGPT's, with `from` and `value`; `system` beside them is the first message.
- `instruction`, `output`, perhaps `input`, `system` and `history`: Alpaca's.
- `prompt` and `completion` (or `response`): lists of messages, or two texts. Texts are taken as they are, without a
  chat template, unless the source says `chat = true`: then they are what a user writes and an assistant answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError, shown
from olmoe.io import documents

Message = dict[str, Any]

# Who speaks, in ShareGPT's words. OpenAI's "developer" is what `olmoe serve` puts before the model as "system".
_SPEAKERS = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's; `trained` says for each message whether its answer is learned."""

    messages: list[Message]
    trained: tuple[bool, ...]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A text and its continuation, which is what is learned. There is no chat template around them."""

    prompt: str
    completion: str


Sample = Conversation | Completion


def read_samples(path: Path, *, chat: bool = False) -> Iterator[Sample]:
    """The samples of a file in their order; `chat` makes chats of prompts and completions that are texts.

    Raises `ConfigError`, with the line, for what is no sample.
    """
    for where, value in read_rows(path):
        yield _sample(value, where, chat)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, each with where it stands. Raises `ConfigError` for all else."""
    if path.suffix.lower() not in documents.OBJECTS:
        raise ConfigError(f"The data file {path} is not JSON by its suffix; give a .jsonl or .json file of chats.")
    found = False
    for where, value in documents.read_objects(path, "The data file", ConfigError):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is not a JSON object, but {shown(value)}.")
        found = True
        yield where, value
    if not found:
        raise ConfigError(f"The data file {path} holds no samples.")


def _sample(value: dict[str, Any], where: str, chat: bool) -> Sample:
    if "messages" in value:
        return conversation(read_messages(value["messages"], where), where, value.get("tools"))
    if "conversations" in value or "conversation" in value:
        turns = value.get("conversations", value.get("conversation"))
        return conversation(_with_system(value, where) + read_messages(turns, where), where, value.get("tools"))
    if "instruction" in value and "output" in value:
        return conversation(_alpaca(value, where), where)
    if "prompt" in value and ("completion" in value or "response" in value):
        prompt, answer = value["prompt"], value.get("completion", value.get("response"))
        if isinstance(prompt, str) and isinstance(answer, str) and not chat:
            return Completion(prompt, answer)
        messages = as_messages(prompt, "user", where) + as_messages(answer, "assistant", where)
        return conversation(messages, where, value.get("tools"))
    raise ConfigError(
        f'{where} has none of the known formats, but the keys {shown(sorted(value))}; it needs "messages", '
        '"conversations", "instruction" and "output", or "prompt" and "completion".'
    )


def conversation(messages: list[Message], where: str, tools: Any = None) -> Conversation:
    """A conversation of these messages. Raises `ConfigError` if the assistant says nothing in it."""
    trained = []
    for message in messages:
        weight = message.pop("weight", 1)
        if weight not in (0, 1):
            raise ConfigError(f"{where} has a message of weight {shown(weight)}; use 0 or 1.")
        trained.append(message["role"] == "assistant" and bool(weight))
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(shown(message["role"]) for message in messages))
        raise ConfigError(
            f'{where} has no message of the role "assistant", only of {roles}, so there is nothing to learn from it.'
        )
    if tools is not None and not isinstance(tools, list):
        raise ConfigError(f"{where} has tools that are not a list, but {shown(tools)}.")
    return Conversation(messages, tuple(trained), tools or None)


def read_messages(turns: Any, where: str) -> list[Message]:
    """Messages in OpenAI's keys or in ShareGPT's. Raises `ConfigError` for anything else."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ConfigError(f"{where} needs a list of messages, not {shown(turns)}.")
    return [_message(turn, where) for turn in turns]


def as_messages(value: Any, role: str, where: str) -> list[Message]:
    """Messages as they are, or one of `role` with a text."""
    return [{"role": role, "content": value}] if isinstance(value, str) else read_messages(value, where)


def _message(turn: Mapping[str, Any], where: str) -> Message:
    speaker = turn.get("role", turn.get("from"))
    if not isinstance(speaker, str):
        raise ConfigError(f'{where} has a message without a "role" (or "from"): {shown(dict(turn))}.')
    # Templates may have roles of their own; those of "from" are known.
    role = _SPEAKERS.get(speaker.lower(), speaker if "role" in turn else None)
    if role is None:
        raise ConfigError(f"{where} has a message from {shown(speaker)}; use {', '.join(_SPEAKERS)}.")
    content = _text(turn.get("content", turn.get("value")))
    if content is None and not turn.get("tool_calls"):
        raise ConfigError(f"{where} has a message without a text: {shown(dict(turn))}.")
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    return {"role": role, "content": content, **rest}


def _text(content: Any) -> str | None:
    """A message's text, even if it comes in parts; None if it has none."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return None if None in parts else "\n".join(map(str, parts))  # as `olmoe serve` joins them
    return content if isinstance(content, str) else None


def _with_system(value: Mapping[str, Any], where: str) -> list[Message]:
    """The system message that is given beside the others, if there is one."""
    system = value.get("system")
    if system in (None, ""):
        return []
    if not isinstance(system, str):
        raise ConfigError(f"{where} has a system message that is not a text, but {shown(system)}.")
    return [{"role": "system", "content": system}]


def _alpaca(value: Mapping[str, Any], where: str) -> list[Message]:
    """Instruction and input are one message with an empty line between them, as open-instruct joins them."""
    texts = {key: value.get(key) or "" for key in ("instruction", "input", "output")}
    odd = next((key for key, text in texts.items() if not isinstance(text, str)), None)
    if odd is not None:
        raise ConfigError(f"{where} has an {odd} that is not a text, but {shown(texts[odd])}.")
    messages, history = _with_system(value, where), value.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        raise ConfigError(f"{where} has a history that is not a list of pairs of texts, but {shown(history)}.")
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": texts["output"]}]
