"""`Conversation`: a chat that remembers what was said, for terminals and notebooks. Neither torch nor a terminal.

It holds the messages and the sampling parameters, streams answers, takes exchanges back, and keeps track of the
context: nothing is ever dropped from a chat that has grown too long; it is refused, and the caller decides.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError, shown

if TYPE_CHECKING:
    from olmoe.engine.llm import LLM
    from olmoe.engine.request import Completion, Routing
    from olmoe.engine.stream import Stream

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
# How turns start in the default template. A base model keeps writing them, for other speakers as well.
_TURNS = ("<|user|>", "<|system|>", "<|assistant|>")


class Conversation:
    """A chat with a model.

    >>> conversation = Conversation(llm, system="Answer in one sentence.")    # doctest: +SKIP
    >>> for piece in conversation.ask("What is a mixture of experts?"):       # doctest: +SKIP
    ...     print(piece, end="", flush=True)

    `params` may be replaced at any time. `last` is the latest answer with its finish reason, None before the first.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams | None = None,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Start with `messages`, from an earlier chat; `system` replaces their system prompt."""
        self.llm, self.params = llm, params or SamplingParams()
        self.last: Completion | None = None
        self.cut_by_context = False  # the last answer ended because the context did
        self._messages = checked_messages(messages)
        if system is not None:
            self.system = system

    # ---- what was said ----

    @property
    def messages(self) -> list[Message]:
        """All messages, in OpenAI's format. A copy."""
        return [dict(message) for message in self._messages]

    @property
    def system(self) -> str | None:
        """The system prompt; None if there is none. It may be set or removed at any time."""
        first = self._messages[0] if self._messages else None
        return str(first["content"]) if first is not None and first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self._messages[1:] if self.system is not None else self._messages
        self._messages = ([] if text is None else [{"role": "system", "content": text}]) + rest

    def replace(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Continue from these messages instead of those so far. Raises `UserError` if they are not a chat."""
        self._messages, self.last, self.cut_by_context = checked_messages(messages), None, False

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.replace([m for m in self._messages[:1] if m["role"] == "system"])

    def undo(self) -> str:
        """Take back the last question with its answer, and return the question. Raises `UserError` without one."""
        place = self._last_question()
        question = str(self._messages[place]["content"])
        self.replace(self._messages[:place])
        return question

    def _last_question(self) -> int:
        places = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if not places:
            raise UserError("Nothing has been asked yet; write a message first.")
        return places[-1]

    # ---- answers ----

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece. Both are in `messages` once the iterator has ended or was closed.

        If the iterator is closed early, the answer so far is kept. Raises `UserError`, at once and with nothing
        changed, for an empty text and if the context has no room.
        """
        if not text.strip():
            raise UserError("The message is empty; write at least one character.")
        return self._answer([*self._messages, {"role": "user", "content": text}])

    def retry(self) -> Iterator[str]:
        """Another answer to the last question; the old one is kept if this raises. Otherwise like `ask`."""
        return self._answer(self._messages[: self._last_question() + 1])

    @property
    def default_template(self) -> bool:
        """Whether the model has no chat template but OLMoE-Instruct's, which it may never have seen."""
        return self.llm.tokenizer.chat_template in (None, OLMOE_CHAT_TEMPLATE)

    @property
    def context_length(self) -> int:
        """How many tokens a chat may have, its next answer included."""
        return self.llm.context_length

    @property
    def left(self) -> int:
        """How many tokens of the context the next question and its answer may take; never below 0."""
        if not self._messages:
            return self.context_length
        tokens = len(self.llm.tokenizer.encode_chat(self._messages, add_generation_prompt=False))
        return max(0, self.context_length - tokens)

    def _answer(self, messages: list[Message]) -> Iterator[str]:
        prompt = self.llm.tokenizer.encode_chat(messages)
        room = self.context_length - len(prompt)
        if room < 1:
            raise UserError(
                f"The chat would have {len(prompt)} tokens, but the model's context ends at {self.context_length}, so "
                "nothing was sent; start again with /reset or take messages back by /undo (in Python, reset and undo)."
            )
        params = self.params
        if self.default_template:
            params = dataclasses.replace(params, stop=[*params.stop, *_TURNS])
        limit = min(room, params.max_new_tokens)
        stream = self.llm.stream(prompt, dataclasses.replace(params, max_new_tokens=limit))
        return self._pieces(messages, stream, limit < params.max_new_tokens)

    def _pieces(self, messages: list[Message], stream: Stream, short: bool) -> Iterator[str]:
        try:
            yield from stream
        except UserError:  # the model's outputs are not finite: there is no answer
            stream.close()
            raise
        except BaseException:  # closed by its reader, or interrupted
            stream.close()
            self._settle(messages, stream, short)
            raise
        self._settle(messages, stream, short)

    def _settle(self, messages: list[Message], stream: Stream, short: bool) -> None:
        assert stream.completion is not None
        self.last = stream.completion
        self.cut_by_context = short and self.last.finish_reason == "length"
        self._messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def expert_use(self) -> npt.NDArray[np.float64]:
        """For each layer and expert (L, E), the share of the last answer's tokens that the expert worked on.

        Needs `params.routing` to have been on. Raises `UserError` if nothing was recorded.
        """
        routing = self.last.routing if self.last is not None else None
        if not routing:
            raise UserError("There is no answer whose experts are known; ask something first.")
        return expert_use(routing, self.llm.config.num_experts)


def expert_use(routing: Sequence[Routing], num_experts: int) -> npt.NDArray[np.float64]:
    """For each layer and expert (L, E), the share of the tokens that the expert worked on."""
    ids = np.stack([each.expert_ids for each in routing])  # (T, L, K)
    counts = np.zeros((ids.shape[1], num_experts))
    for layer in range(ids.shape[1]):
        chosen = ids[:, layer]
        counts[layer] = np.bincount(chosen[chosen >= 0], minlength=num_experts)
    return counts / len(ids)


# ---- messages in files ----


def dump_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as a JSON list, in the format of `messages` in OpenAI's clients."""
    text = json.dumps(list(messages), indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates, as JSON escapes them


def parse_messages(text: str, source: str) -> list[Message]:
    """The messages in a JSON list, or in an object that has them under "messages". `source` is named in errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{source} is not JSON ({reason}); give a file that /save wrote.") from None
    try:
        return checked_messages(value["messages"] if isinstance(value, dict) and "messages" in value else value)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')} ({source}).") from None


def checked_messages(value: object) -> list[Message]:
    """Messages with a role and a text, copied. Raises `UserError` for anything else, and names the message."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise UserError(f"A chat is a list of messages with role and content, not {type(value).__name__}.")
    messages = []
    for number, each in enumerate(value):
        if not isinstance(each, Mapping):
            raise UserError(f"Message {number} must be an object with role and content, not {shown(each)}.")
        role, content = each.get("role"), _text_of(each.get("content"))
        if role not in ROLES:
            raise UserError(f"Message {number} must have a role of {', '.join(ROLES)}, not {shown(role)}.")
        if content is None:
            raise UserError(f"Message {number} must have a text as content, not {shown(each.get('content'))}.")
        if role == "system" and number:
            raise UserError(f"Message {number} is a system prompt, which can only be the first message; move it.")
        messages.append({"role": role, "content": content})
    return messages


def _text_of(content: object) -> str | None:
    """A text, or the texts of OpenAI's content parts; None for anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(str(text) for text in texts)
