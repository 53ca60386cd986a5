"""Chat templates, rendered as `transformers` renders them: Jinja programs that turn messages into one text. No torch.

A template sees the messages, `tools`, `documents`, `add_generation_prompt`, and the text of each special token that
the tokenizer has. It runs in a sandbox. Beyond plain Jinja it may use `{% generation %}` (marks what the assistant
writes), `{% break %}` and `{% continue %}`, `raise_exception`, `strftime_now` and a `tojson` that escapes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from olmoe.errors import TokenizerError

# OLMoE-Instruct's own template, for checkpoints without one (0924 and 0125 have the same). Its output is
# unchanged; the generation marks tell a trainer which tokens are the assistant's: its answer and the end of text.
OLMOE_CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' -}}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

# Names under which a message may carry the model's reasoning. Templates read either the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Put around what the assistant writes while its place in a text is found. Unicode reserves them for such use.
_ANSWER, _ANSWER_END = "\ufdd0", "\ufdd1"
_OPEN_END = "THE-MODEL-CONTINUES-HERE "  # after a message to be continued; its last space shows if a template trims


def render(
    template: str,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of `messages` in `template`; `variables` are whatever else it sees, mostly special tokens.

    With `continue_final_message` the text ends within the last message, at the end of its content (or of the field
    named), so that a model continues it. Raises `TokenizerError` for anything but a chat, and for a template that is
    broken or refuses these messages.
    """
    if add_generation_prompt and continue_final_message:
        raise TokenizerError(
            "A chat cannot both continue its final message and open a new one; leave out continue_final_message or "
            "add_generation_prompt."
        )
    chat = _as_chat(messages)
    ending = _open_final_message(chat, template, continue_final_message) if continue_final_message else None
    text = _render(
        template,
        chat,
        tools=tools,
        variables=variables,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
    )
    return text if ending is None else _cut_at_the_mark(text, ending)


def render_answers(
    template: str,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of `messages`, and where the assistant's answers are in it: (start, end) in characters, in order.

    Answers are what the template puts between `{% generation %}` marks. If it has none, they are the contents of the
    assistant's messages, without what the template writes after them. Raises `TokenizerError` as `render` does, and if
    the answers cannot be found.
    """
    seen: dict[str, Any] = {"tools": tools, "variables": variables}
    text = render(template, messages, **seen)
    if _ANSWER in text or _ANSWER_END in text:
        raise TokenizerError("A chat message has the character U+FDD0 or U+FDD1, which is no text; remove it.")
    chat = _as_chat(messages)
    if _has_marks(template):
        marked = _render(template, chat, marked=True, **seen)
    else:
        for message in chat:
            if message["role"] == "assistant" and isinstance(message.get("content"), str):
                message["content"] = _ANSWER + message["content"] + _ANSWER_END
        marked = _render(template, chat, **seen)
    spans, plain, found = [], "", marked
    while _ANSWER in found:
        before, _, rest = found.partition(_ANSWER)
        answer, _, found = rest.partition(_ANSWER_END)
        plain += before
        spans.append((len(plain), len(plain) + len(answer)))
        plain += answer
    if plain + found != text:
        raise TokenizerError(
            "The chat template changes what the assistant writes, so its place in the text is not known; put "
            "{% generation %} and {% endgeneration %} around it in the template."
        )
    return text, spans


def _has_marks(template: str) -> bool:
    return re.search(r"{%-?\s*generation\b", template) is not None


def _render(
    template: str,
    chat: list[dict[str, Any]],
    *,
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any] | None,
    documents: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    marked: bool = False,
) -> str:
    schemas, texts = _as_tools(tools), _as_documents(documents)
    try:
        text: str = _compiled(template, marked).render(
            messages=chat,
            tools=schemas,
            documents=texts,
            add_generation_prompt=add_generation_prompt,
            **_plain(dict(variables or {})),
        )
    except Exception as error:  # a template is a program: it can fail in any way
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        odd = next((m for m in chat if not isinstance(m.get("content"), str)), None)
        if odd is not None:
            raise TokenizerError(
                f"A chat message needs a role and a text content, not {odd!r}, for this chat template ({reason})."
            ) from None
        raise TokenizerError(f"The chat template refuses these messages: {reason}.") from None
    return text


@functools.lru_cache(maxsize=32)
def _compiled(template: str, marked: bool) -> Any:
    return _environment(marked).from_string(template)


@functools.cache
def _environment(marked: bool) -> Any:
    """The sandbox that templates run in, with what they may call. Jinja is imported here, only for chats.

    If `marked`, the output of a generation block is put between `_ANSWER` and `_ANSWER_END`.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`: what is between the marks is written as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block with its own scope, as a call has in transformers: variables set inside stay inside.
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Any) -> Any:
            return f"{_ANSWER}{caller()}{_ANSWER_END}" if marked else caller()

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    def now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter sorts the keys and escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- what a template sees ----


def _as_chat(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages in plain types, without empty fields. Raises `TokenizerError` if it is not a chat."""
    messages = getattr(messages, "messages", messages)
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TokenizerError(f"A chat is a list of messages with role and content, not {type(messages).__name__}.")
    if not messages:
        raise TokenizerError("A chat needs at least one message.")
    chat = []
    for given in messages:
        message = _plain(given)
        if not isinstance(message, dict):
            raise TokenizerError(f"A chat message needs a role and a text content, not {given!r}.")
        # Clients write `content: null` beside tool calls; templates expect such a field to be absent.
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message and "content" not in message:
            raise TokenizerError(f"A chat message needs a role and a text content, not {given!r}.")
        if not isinstance(message.get("role"), str):
            raise TokenizerError(f"Unknown chat role {message.get('role')!r}; use system, user or assistant.")
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        chat.append(message)
    return chat


def _as_tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise TokenizerError(f"A tool is given by its JSON schema, a dictionary, not as {tool!r}.")
    return [_plain(tool) for tool in tools]


def _as_documents(documents: Any) -> list[Any] | None:
    if documents is None:
        return None
    for document in documents:
        if not isinstance(document, Mapping):
            raise TokenizerError(f"A document is a dictionary with title and text, not {document!r}.")
    return [_plain(document) for document in documents]


def _plain(value: Any) -> Any:
    """`value` in the types of JSON, copied: a template must neither change nor call what the caller passed."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enumerations and the like, without their other abilities
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    return _plain_object(value)


def _plain_object(value: Any) -> Any:
    """Other types that messages may have than dictionaries; else a text that names the type, enough for a template."""
    if type(value).__module__ == "numpy" and hasattr(value, "dtype") and not getattr(value, "ndim", 1):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # a pydantic model, as API clients return
        return _plain(dump())
    return f"<{type(value).__name__}>"


# ---- a final message that is to be continued ----


def _open_final_message(chat: list[dict[str, Any]], template: str, wanted: bool | str) -> str:
    """Mark the end of the last message's text, and return that text."""
    field = wanted if isinstance(wanted, str) else "content"
    last = chat[-1]
    content = last.get(field)
    if not isinstance(content, str | list | tuple):
        raise TokenizerError(f"The final message has no {field!r} to continue.")
    fields = [field]
    if field in _REASONING:  # it was copied to the other name, and the template may read either
        fields = [name for name in _REASONING if last.get(name) == content]
    if not any(name in template for name in fields):
        raise TokenizerError(f"The chat template does not write {field!r}, so it cannot be continued.")
    if isinstance(content, str):
        for name in fields:
            last[name] = content + _OPEN_END
        return content
    for part in reversed(content):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _OPEN_END
            return text
    raise TokenizerError("The final message has no text to continue.")


def _cut_at_the_mark(text: str, ending: str) -> str:
    place = text.rfind(_OPEN_END.strip())
    if place < 0 or ending.strip() not in text:
        raise TokenizerError("The chat template leaves the final message out, so it cannot be continued.")
    whole = text.startswith(_OPEN_END, place)
    return text[:place] if whole else text[:place].rstrip()  # a template that trims would have trimmed here
