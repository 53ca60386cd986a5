"""Text to ids and back: `tokenizer.json` through the `tokenizers` library, chat templates, streaming. No torch.

The ends of texts are known by id, never by name: id 50279 is `<|endoftext|>` in the base models and
`|||IP_ADDRESS|||` in the post-trained 0125 models, where the string `<|endoftext|>` encodes to 0.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoe.errors import TokenizerError

# Stands for the BOS and EOS tokens while a chat template is rendered; a private-use character pair that
# no message may contain. Ids take its place afterwards.
_MARK = "\ue0f0\ue0f1"

# OLMoE-Instruct's own template, for checkpoints that bring none (facts: identical in 0924 and 0125).
OLMOE_CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""


class Tokenizer:
    """A byte-level BPE tokenizer and the ids that end and pad a text.

    `eos_ids` and `pad_id` come from the model's configuration. The first of `eos_ids` stands where a chat
    template writes BOS or EOS.
    """

    def __init__(
        self, backend: Any, *, eos_ids: Sequence[int] = (), pad_id: int | None = None, chat_template: str | None = None
    ) -> None:
        self._backend = backend
        self.eos_ids, self.pad_id, self.chat_template = tuple(eos_ids), pad_id, chat_template
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special) | set(self.eos_ids)
        self._bytes_cache: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Tokenizer:
        """Read a `tokenizer.json`. Raises `TokenizerError` if it is missing, broken or not byte-level."""
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"There is no {path}; a checkpoint folder needs a tokenizer.json.")
        try:
            text = path.read_text(encoding="utf-8")
            decoder = json.loads(text).get("decoder") or {}
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception for whatever it dislikes
            raise TokenizerError(f"{path} is not a tokenizer file ({error}).") from None
        if decoder.get("type") != "ByteLevel":
            raise TokenizerError(f"{path} is not byte-level (its decoder is {decoder.get('type')!r}), as OLMoE's is.")
        # A file may ask for truncation or padding; a generator must see exactly the text it was given.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, **options)

    @classmethod
    def from_folder(cls, folder: str | Path, *, eos_ids: Sequence[int] = (), pad_id: int | None = None) -> Tokenizer:
        """Read `tokenizer.json` and the chat template of a checkpoint folder."""
        folder = Path(folder)
        return cls.from_file(
            folder / "tokenizer.json", eos_ids=eos_ids, pad_id=pad_id, chat_template=_read_chat_template(folder)
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows, which are padding."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added before or after it. Raises `TokenizerError` for lone surrogates."""
        _check_unicode(text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        for text in texts:
            _check_unicode(text)
        return [list(e.ids) for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary are dropped."""
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self._special)).decode(
            "utf-8", errors="replace"
        )

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token (EOS, padding), which has no text of its own."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; a character may be spread over several ids."""
        cached = self._bytes_cache.get(token_id)
        if cached is None:
            cached = self._bytes_cache[token_id] = self._compute_bytes(token_id)
        return cached

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # not written in the byte alphabet: the token is its own text, as in the library
            return token.encode()

    def special_tokens(self) -> dict[str, str]:
        """The texts that transformers must take for EOS, BOS, unknown and padding: those of the ids.

        Byte-level text is never unknown; transformers' class of this tokenizer wants a token all the same.
        """
        texts: dict[str, str] = {}
        if self.eos_ids and (eos := self._backend.id_to_token(self.eos_ids[0])) is not None:
            texts = {"eos_token": eos, "bos_token": eos, "unk_token": eos}
        if self.pad_id is not None and self.pad_id >= 0 and (pad := self._backend.id_to_token(self.pad_id)) is not None:
            texts["pad_token"] = pad
        return texts

    def transformers_config(self, max_length: int) -> str:
        """The `tokenizer_config.json` with which transformers reads `tokenizer.json` as it is, ends by id."""
        values: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        return json.dumps(values | self.special_tokens(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> str:
        """The chat template applied to `messages` (each with `role` and `content`).

        BOS and EOS appear as the text of the EOS id unless given. Raises `TokenizerError` for no messages,
        messages without role or content, unknown roles, or a template that refuses them.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not messages:
            raise TokenizerError("A chat needs at least one message.")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
                raise TokenizerError(f"A chat message needs a role and a text content, not {message!r}.")
            if message.get("role") not in ("system", "user", "assistant"):
                raise TokenizerError(f"Unknown chat role {message.get('role')!r}; use system, user or assistant.")
        eos_text = self._added.get(self.eos_ids[0], "") if self.eos_ids else ""

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self.chat_template or OLMOE_CHAT_TEMPLATE).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=eos_text if bos_token is None else bos_token,
                eos_token=eos_text if eos_token is None else eos_token,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = str(error).rstrip(".")
            raise TokenizerError(f"The chat template refuses these messages: {reason}.") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a chat, with BOS and EOS written as the EOS id whatever its name is in this tokenizer."""
        if any(isinstance(message, Mapping) and _MARK in str(message.get("content", "")) for message in messages):
            raise TokenizerError("A chat message contains the private-use characters U+E0F0 U+E0F1; remove them.")
        marks = {"bos_token": _MARK, "eos_token": _MARK} if self.eos_ids else {"bos_token": "", "eos_token": ""}
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **marks)
        pieces = text.split(_MARK)
        ids = self.encode(pieces[0])
        for piece in pieces[1:]:
            ids += [self.eos_ids[0], *self.encode(piece)]
        return ids


class IncrementalDetokenizer:
    """Turns ids into text as they come, holding back bytes until they make whole characters.

    The pieces joined (with `finish`) are exactly `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back at the end of a text: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _read_chat_template(folder: Path) -> str | None:
    """The template of `chat_template.jinja` or `tokenizer_config.json`, if there is one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text ({error}).") from None
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"{path} is not a JSON object ({error}).") from None
    if isinstance(template, list):  # named templates: take the default one
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _check_unicode(text: str) -> None:
    """Refuse half characters, which JSON escapes and undecodable command-line bytes can bring into a `str`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; remove it or encode the text as UTF-8."
        ) from None


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()
