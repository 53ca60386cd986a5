"""Text to ids and back: `tokenizer.json` by the `tokenizers` library, chat templates, streaming. No torch.

End-of-text tokens are identified by id, never by name: id 50279 is `<|endoftext|>` in the base models and
`|||IP_ADDRESS|||` in the post-trained 0125 models, where the string `<|endoftext|>` encodes to 0.
"""

from __future__ import annotations

import codecs
import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE, render, render_answers
from olmoe.errors import TokenizerError
from olmoe.io.foreign import check_contents
from olmoe.io.json_file import read_optional_object
from olmoe.io.text_file import read_text

# The tokens that a tokenizer may name, and a chat template see, under transformers' names.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Where a checkpoint keeps templates other than the default, each in a file named after it.
TEMPLATES_FOLDER = "additional_chat_templates"

# A space between words: tokens end there, whatever comes before and after it.
_SPACE = re.compile(r"(?<=\S) (?=\S)")

_log = logging.getLogger("olmoe")


class Tokenizer:
    """A byte-level BPE tokenizer and the ids that end and pad a text.

    `eos_ids` and `pad_id` come from the model's configuration. `chat_template` is the checkpoint's own, None if it
    has none, and `named_templates` are its other ones ("tool_use" is used when tools are given). `named` are the
    special tokens that the checkpoint itself names; if it does not name the end of a text, the first of `eos_ids`
    is what a chat template writes as BOS and EOS.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
        named_templates: Mapping[str, str] | None = None,
        named: Mapping[str, str | None] | None = None,
    ) -> None:
        self._backend = backend
        self.eos_ids, self.pad_id, self.chat_template = tuple(eos_ids), pad_id, chat_template
        self.named_templates, self._named = dict(named_templates or {}), dict(named or {})
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special) | set(self.eos_ids)
        self._bytes_cache: dict[int, bytes] = {}
        self._left_out: set[str] = set()  # roles of messages that the user was told of

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> Tokenizer:
        """Read a `tokenizer.json`. Raises `TokenizerError` if it is missing, broken or not byte-level."""
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        if not path.is_file():
            raise TokenizerError(f"There is no {path}; a checkpoint folder needs a tokenizer.json.")
        try:
            text = read_text(path)
            decoder = json.loads(text).get("decoder") or {}
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception for whatever it dislikes
            check_contents(path, "tokenizer file")
            raise TokenizerError(f"{path} is not a tokenizer file ({error}).") from None
        if decoder.get("type") != "ByteLevel":
            raise TokenizerError(f"{path} is not byte-level (its decoder is {decoder.get('type')!r}), as OLMoE's is.")
        # A file may request truncation or padding; a generator must see exactly the text it was given.
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, **options)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> Tokenizer:
        """Read `tokenizer.json`, the chat templates and the names of special tokens of a checkpoint folder.

        `templates` by name take the place of its own.
        """
        folder = Path(folder)
        templates = dict(templates or chat_templates(folder))
        settings = read_optional_object(folder / "tokenizer_config.json", TokenizerError)
        return cls.from_file(
            folder / "tokenizer.json",
            eos_ids=eos_ids,
            pad_id=pad_id,
            chat_template=templates.pop("default", None),
            named_templates=templates,
            named=_read_named(folder, settings),
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows, which are padding."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added before or after it. Raises `TokenizerError` for lone surrogates."""
        _check_unicode(text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_parts(self, text: str, characters: int = 1 << 20) -> Iterator[list[int]]:
        """`encode` for a text of any length, in parts of about `characters`: together they are its ids.

        A whole book at once needs a hundred times its size. Parts end before a space between words, where byte-level
        tokenizers split a text anyway.
        """
        start = 0
        while (space := _SPACE.search(text, start + characters)) is not None:
            yield self.encode(text[start : space.start()])
            start = space.start()
        yield self.encode(text[start:])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        for text in texts:
            _check_unicode(text)
        # The fast variant omits offsets, which are not needed here. Both let other threads run meanwhile.
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def certain_tokens(self, text: str, most: int) -> int | None:
        """A lower bound on the number of tokens of `text`, if it is quickly seen to exceed `most`; None if it is not.

        Only a first part of it is encoded, which ends before a space, where byte-level tokenizers split a text anyway.
        Refusing a text that is far too long thus costs no more than encoding one of the allowed length.
        """
        size = 16 * most
        if len(text) <= 2 * size:
            return None
        end = text.rfind(" ", 0, size)
        while end > 0 and text[end - 1].isspace():
            end -= 1
        found = len(self.encode_batch([text[:end]])[0]) if end > 0 else 0
        return found if found > most else None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary are dropped."""
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self._special)).decode(
            "utf-8", errors="replace"
        )

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token (EOS, padding), which has no text of its own."""
        return token_id in self._special

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, None if the vocabulary has no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

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
        except KeyError:  # not in the byte alphabet: the token is its own text, as in the library
            return token.encode()

    def special_tokens(self) -> dict[str, str]:
        """The texts that transformers must take for EOS, BOS, unknown and padding: those of the ids, unless named.

        Byte-level text is never unknown, but transformers' class for this tokenizer requires such a token.
        """
        texts: dict[str, str | None] = {}
        if "eos_token" not in self._named:
            if self.eos_ids and (eos := self._backend.id_to_token(self.eos_ids[0])) is not None:
                texts = {"bos_token": eos, "eos_token": eos, "unk_token": eos}
            if self.pad_id is not None and self.pad_id >= 0:
                texts["pad_token"] = self._backend.id_to_token(self.pad_id)
        texts |= self._named
        return {name: text for name in SPECIAL_NAMES if (text := texts.get(name)) is not None}

    def extra_special_tokens(self) -> dict[str, str]:
        """Special tokens under the checkpoint's own names, such as `image_token`, which templates see as well."""
        return {name: text for name, text in self._named.items() if name not in SPECIAL_NAMES and text is not None}

    def transformers_config(self, max_length: int) -> str:
        """A `tokenizer_config.json` that makes transformers read `tokenizer.json` unchanged, EOS and padding by id."""
        values: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": self._template(None, False),
        }
        if self.named_templates:
            every = {"default": values["chat_template"]} | self.named_templates
            values["chat_template"] = [{"name": name, "template": text} for name, text in every.items()]
        if extra := self.extra_special_tokens():
            values["extra_special_tokens"] = extra
        return json.dumps(values | self.special_tokens(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def render_chat(
        self,
        /,  # a template's variable may be called `messages`
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The chat template applied to `messages`, as transformers' `apply_chat_template` does it.

        The text ends where the assistant starts to answer, unless `add_generation_prompt` is False or the final
        message is to be continued. `chat_template` is a template, or the name of one that the checkpoint has;
        `variables` are whatever else the template sees, and override the special tokens. Raises `TokenizerError` if
        there are no messages, if one has no role, or if the template refuses them.
        """
        template = self._template(chat_template, tools is not None)
        return render(
            template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=self._variables(template, messages) | variables,
        )

    def render_answers(
        self, messages: Sequence[Any], *, tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """A whole chat as `render_chat` writes it, and where the assistant's answers are in it, for training."""
        template = self._template(None, tools is not None)
        return render_answers(template, messages, tools=tools, variables=self._variables(template, messages))

    def _variables(self, template: str, messages: Sequence[Any]) -> dict[str, Any]:
        """What a template sees in addition to the chat."""
        seen: dict[str, Any] = {}
        if template == OLMOE_CHAT_TEMPLATE:  # it writes the end of a text even where the model has none
            seen = {"bos_token": "", "eos_token": ""}
            self._warn_of_roles(messages)
        return seen | self.special_tokens() | self.extra_special_tokens()

    def _warn_of_roles(self, messages: Sequence[Any]) -> None:
        """Warn about messages that OLMoE's template silently leaves out, once for each role."""
        roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
        for role in dict.fromkeys(role for role in roles if isinstance(role, str)):
            if role not in ("system", "user", "assistant") and role not in self._left_out:
                self._left_out.add(role)
                _log.warning("OLMoE's chat template leaves out messages of the role %r", role)

    def encode_chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """Ids of a chat; `options` are those of `render_chat`."""
        return self.encode_rendered(self.render_chat(messages, **options))

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of what `render_chat` has returned."""
        _check_unicode(text)
        # A batch, even of one text, lets other threads run meanwhile.
        return list(self._chat_backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def template(self, name: str | None = None) -> str:
        """The chat template of that name, or the one chats are put through: OLMoE's, if the checkpoint has none."""
        return self._template(name, False)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_rendered`, and which characters of `text` each id stands for: (start, end).

        A character that is spread over several ids is in the range of each.
        """
        _check_unicode(text)
        encoding = self._whole_backend.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    @property
    def default_template(self) -> str:
        """The chat template for chats without tools: the checkpoint's, or else OLMoE's."""
        return self._template(None, False)

    def _template(self, wanted: str | None, tools: bool) -> str:
        """The template to use: the one wanted by name or text, the one for tools, the checkpoint's, or else OLMoE's."""
        if wanted is not None:
            own = self.chat_template if wanted == "default" else None
            return self.named_templates.get(wanted, own or wanted)
        if tools and "tool_use" in self.named_templates:
            return self.named_templates["tool_use"]
        return self.chat_template or OLMOE_CHAT_TEMPLATE

    @functools.cached_property
    def _whole_backend(self) -> Any:
        """`_chat_backend` with the offsets of whole tokens: the file's own last step leaves spaces out of them."""
        backend = type(self._backend).from_str(self._chat_backend.to_str())
        backend.post_processor = None
        return backend

    @functools.cached_property
    def _chat_backend(self) -> Any:
        """The backend with every special token that a template writes: some are ordinary entries of the vocabulary."""
        from tokenizers import AddedToken

        added = set(self._added.values())
        named = self.special_tokens() | self.extra_special_tokens()
        texts = dict.fromkeys(text for text in named.values() if text not in added)
        known = [text for text in texts if self._backend.token_to_id(text) is not None]
        if not known:
            return self._backend
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in known])
        return backend


class IncrementalDetokenizer:
    """Turns ids into text as they come, holding back bytes until they make whole characters.

    Everything returned, joined, `finish` included, is exactly `Tokenizer.decode` of all ids.
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


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name: "default", and others."""
    if files := _read_template_files(folder):
        return files
    return _templates_of(read_optional_object(folder / "tokenizer_config.json", TokenizerError))


def _read_template_files(folder: Path) -> dict[str, str]:
    """Chat templates by name that have their own files, which take precedence over `tokenizer_config.json`."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    found = {}
    for name, path in files.items():
        if path.is_file():
            try:
                found[name] = read_text(path)
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{path} is not UTF-8 text ({error}).") from None
    return found


def _templates_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name in `tokenizer_config.json`, which has one, a list of named ones, or an object of them."""
    given = settings.get("chat_template")
    entries: list[Any] = given if isinstance(given, list) else [{"name": "default", "template": given}]
    if isinstance(given, dict):
        entries = [{"name": name, "template": text} for name, text in given.items()]
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries if isinstance(entry, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _read_named(folder: Path, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """The special tokens that a checkpoint folder names; None for those it says do not exist."""
    named = {name: settings[name] for name in SPECIAL_NAMES if name in settings}
    if "added_tokens_decoder" not in settings:  # older folders keep the names in a separate file
        older = read_optional_object(folder / "special_tokens_map.json", TokenizerError)
        named |= {name: older[name] for name in SPECIAL_NAMES if name in older}
    more = settings.get("extra_special_tokens")  # which transformers shows to templates by their names
    named |= more if isinstance(more, dict) else {}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if text is None or isinstance(text, str)}


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
