"""The tokenizer against the raw `tokenizers` library, transformers' chat rendering, and golden ids."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from olmoe.errors import TokenizerError, UserError
from olmoe.tokenizer import OLMOE_CHAT_TEMPLATE, IncrementalDetokenizer, Tokenizer

EOS = 50279

TEXTS = [
    "Bitcoin is",
    "",
    " ",
    "\n\n\n",
    " leading and trailing ",
    "It's we'll THEY'RE don’t",
    "Grüße aus Köln, naïve café, e\u0301 composed and é",  # NFC joins the first accent
    "日本語のテキスト、中文文本, 한국어 텍스트",
    "שלום עולם مرحبا بالعالم नमस्ते",
    "emoji 😀👍🏽 family 👨‍👩‍👧‍👦 flag 🇩🇪 end",
    "zero\u200bwidth, nbsp\u00a0, bom\ufeff, replacement \ufffd",
    "\x00\x01\x7f control characters \x1b[0m",
    *(f"run of {n}:{' ' * n}|" for n in (1, 2, 3, 23, 24, 25, 26, 48, 60)),
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2, 3]}  # comment\n\n\nclass A:\n        pass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }\r\n",
    "1234567890 3.14159 1e-5 0xFF 2024-01-01",
    "mail |||EMAIL_ADDRESS||| phone |||PHONE_NUMBER||| ip |||IP_ADDRESS|||",
    "<|endoftext|> and <|padding|> inside, <|user|> is text",
    "𝕳𝖊𝖑𝖑𝖔 ᚠᛇᚻ 🜁 \U0010ffff",
    "a" * 300,
]


@pytest.fixture(scope="module")
def released(olmoe_tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(EOS,), pad_id=1)


@pytest.fixture(scope="module")
def raw(olmoe_tokenizer_file) -> RawTokenizer:
    return RawTokenizer.from_file(str(olmoe_tokenizer_file))


@pytest.fixture(scope="module")
def swapped(olmoe_tokenizer_file, tmp_path_factory) -> Tokenizer:
    """The released tokenizer with the names of ids 0 and 50279 exchanged, as in the post-trained 0125 models."""
    contents = json.loads(olmoe_tokenizer_file.read_text(encoding="utf-8"))
    names = {0: "<|endoftext|>", EOS: "|||IP_ADDRESS|||"}
    for token in contents["added_tokens"]:
        if token["id"] in names:
            token["content"] = names[token["id"]]
            token["special"], token["normalized"] = token["id"] == 0, token["id"] != 0
    contents["model"]["vocab"] |= {name: number for number, name in names.items() if name in contents["model"]["vocab"]}
    path = tmp_path_factory.mktemp("swapped") / "tokenizer.json"
    path.write_text(json.dumps(contents), encoding="utf-8")
    return Tokenizer.from_file(path, eos_ids=(EOS,), pad_id=1)


def random_text(rng: random.Random) -> str:
    """Characters of every UTF-8 length, and spaces in runs."""
    ranges = [(0x20, 0x7E), (0xA0, 0x2FF), (0x400, 0x52F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x20, 0x20)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))


# ---- encoding and decoding ----


def test_golden_ids_of_the_released_tokenizer(released):
    assert released.encode("Bitcoin is") == [12871, 9669, 310]
    assert released.encode("<|endoftext|><|user|>\nHello\n<|assistant|>\n") == [
        50279, 29, 93, 4537, 49651, 187, 12092, 187, 29, 93, 515, 5567, 49651, 187,
    ]  # fmt: skip
    assert released.encode(" " * 24) == [50254]
    assert released.encode("  ") == [50276]
    assert released.encode("|||IP_ADDRESS|||<|padding|>|||EMAIL_ADDRESS||||||PHONE_NUMBER|||") == [0, 1, 50277, 50278]
    assert released.vocab_size == 50280


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_agree_with_the_library(released, raw, text):
    ids = released.encode(text)
    assert ids == raw.encode(text, add_special_tokens=False).ids
    for skip in (True, False):
        assert released.decode(ids, skip_special_tokens=skip) == raw.decode(ids, skip_special_tokens=skip)
    assert released.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_random_texts_round_trip_and_agree_with_the_library(released, raw):
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(500)]
    batch = released.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == released.encode(text) == raw.encode(text, add_special_tokens=False).ids
        assert released.decode(ids) == raw.decode(ids) == unicodedata.normalize("NFC", text)


def test_parts_of_a_text_have_its_ids(released):
    rng = random.Random(5)
    for _ in range(20):
        text = " ".join(random_text(rng) for _ in range(rng.randrange(1, 6)))
        for size in (1, 40, len(text)):
            parts = list(released.encode_parts(text, size))
            assert [i for part in parts for i in part] == released.encode(text)
    assert len(list(released.encode_parts("Once upon a time", 1))) == 4
    assert list(released.encode_parts("")) == [[]]


def test_random_ids_decode_as_in_the_library_invalid_bytes_included(released, raw):
    rng = random.Random(2)
    for _ in range(1000):
        ids = [rng.randrange(released.vocab_size) for _ in range(rng.randint(1, 12))]
        for skip in (True, False):
            assert released.decode(ids, skip_special_tokens=skip) == raw.decode(ids, skip_special_tokens=skip)


def test_every_id_has_the_bytes_that_the_library_shows(released, raw):
    for number in range(released.vocab_size):
        expected = raw.decode([number], skip_special_tokens=False)
        assert released.token_bytes(number).decode("utf-8", errors="replace") == expected


def test_special_tokens_are_dropped_or_shown(released):
    ids = [12871, EOS, 1, 310, 0]
    assert released.decode(ids) == "Bit is|||IP_ADDRESS|||"
    assert released.decode(ids, skip_special_tokens=False) == "Bit<|endoftext|><|padding|> is|||IP_ADDRESS|||"
    assert [released.is_special(i) for i in (EOS, 1, 0, 310)] == [True, True, False, False]


def test_ids_outside_the_vocabulary_are_dropped(released):
    for foreign in (-1, 50280, 50303, 2**31, 2**32, 2**70):
        assert released.token_bytes(foreign) == b""
        assert released.decode([12871, foreign, 310]) == "Bit is"


def test_lone_surrogates_are_refused_with_one_sentence(released):
    sentence = r"^The text is not valid Unicode: character 2 is the lone surrogate U\+DC80; remove it[^.\n]*\.$"
    for call in (released.encode, lambda text: released.encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match=sentence):
            call("ab\udc80c")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        released.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_truncation_and_padding_of_the_file_are_ignored(olmoe_tokenizer_file, released, tmp_path):
    backend = RawTokenizer.from_file(str(olmoe_tokenizer_file))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.encode("Bitcoin is") == [12871, 9669, 310]
    assert tokenizer.encode_batch(["Bitcoin is", "a"]) == [[12871, 9669, 310], released.encode("a")]


def test_a_vocabulary_entry_that_is_no_byte_string_is_its_own_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                "model": {"type": "BPE", "vocab": {"a": 0, "b c": 1, "Ġd": 2, "→": 3}, "merges": []},
            }
        ),
        encoding="utf-8",
    )
    ids = [0, 1, 2, 3]
    assert Tokenizer.from_file(path).decode(ids) == RawTokenizer.from_file(str(path)).decode(ids) == "ab c d→"


# ---- streaming ----


def pieces_of(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def test_pieces_of_random_ids_join_to_the_decoded_text(released, raw):
    rng = random.Random(3)
    # Ids of single bytes make broken and split characters the rule rather than the exception.
    single_bytes = [i for i in range(released.vocab_size) if len(released.token_bytes(i)) == 1]
    assert len(single_bytes) == 256 - 13  # 13 bytes never occur in UTF-8: C0, C1, F5 to FF
    for trial in range(4000):
        choices = single_bytes if trial % 2 else range(released.vocab_size)
        ids = rng.choices(choices, k=rng.randint(0, 16))
        ids = [*ids, *rng.choices([EOS, 1, -1, 50290], k=trial % 3)]
        rng.shuffle(ids)
        skip = trial % 4 < 2
        text = released.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces_of(released, ids, skip_special_tokens=skip)) == text


def test_no_piece_of_a_valid_text_holds_half_a_character(released):
    rng = random.Random(4)
    texts = [t for t in TEXTS if "\ufffd" not in t] + [random_text(rng) for _ in range(300)]
    split = 0
    for text in texts:
        ids = released.encode(text)
        pieces = pieces_of(released, ids, skip_special_tokens=False)
        assert all("\ufffd" not in piece for piece in pieces)
        assert pieces[-1] == ""
        assert "".join(pieces) == unicodedata.normalize("NFC", text)
        split += pieces.count("") - 1
    assert split > 1000  # characters were indeed spread over tokens


def test_a_character_appears_with_its_last_token_and_no_later(released):
    text = "🜁"  # four bytes, in several tokens
    ids = released.encode(text)
    assert len(ids) > 1
    assert pieces_of(released, ids) == [""] * (len(ids) - 1) + [text, ""]
    assert pieces_of(released, [*ids, EOS]) == [""] * (len(ids) - 1) + [text, "", ""]
    cut = pieces_of(released, ids[:-1])
    assert set(cut[:-1]) == {""}
    assert cut[-1] == "\ufffd"  # only when the text has ended is it certain that the rest never comes


def test_special_tokens_in_a_stream(released):
    assert pieces_of(released, [12871, EOS, 310]) == ["Bit", "", " is", ""]
    assert pieces_of(released, [12871, EOS, 310], skip_special_tokens=False) == ["Bit", "<|endoftext|>", " is", ""]


# ---- files ----


def test_missing_and_broken_files_are_one_sentence(tmp_path, olmoe_tokenizer_file):
    with pytest.raises(TokenizerError, match=r"^There is no .*tokenizer.json; a checkpoint folder needs"):
        Tokenizer.from_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    full = olmoe_tokenizer_file.read_bytes()
    for content in (b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", full[: len(full) // 2], b'{"decoder": "ByteLevel"}'):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"is not a tokenizer file") as caught:
            Tokenizer.from_file(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(TokenizerError, match="There is no"):
        Tokenizer.from_file(path)
    assert issubclass(TokenizerError, UserError)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        path.write_text(
            json.dumps(
                {"version": "1.0", "decoder": decoder, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
            )
        )
        with pytest.raises(TokenizerError, match="is not byte-level"):
            Tokenizer.from_file(path)


@pytest.fixture
def folder(tokenizer_file, tmp_path) -> Path:
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    return tmp_path


MESSAGE = [{"role": "user", "content": "Hi"}]


def rendered(folder: Path) -> str:
    return Tokenizer.from_folder(folder).render_chat(MESSAGE)


def test_the_template_of_tokenizer_config_is_used(folder):
    assert rendered(folder) == "<|user|>\nHi\n<|assistant|>\n"  # none given: OLMoE's own
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "A{{ messages[0]['content'] }}"}))
    assert rendered(folder) == "AHi"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ messages[0].role }}"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered(folder) == "Duser"
    for template in (None, 3, [], [{"name": "other", "template": "O"}], ["default"]):
        config.write_text(json.dumps({"chat_template": template}))
        assert rendered(folder) == "<|user|>\nHi\n<|assistant|>\n"


def test_chat_template_jinja_comes_first(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    (folder / "chat_template.jinja").write_text("jinja Ü {{ messages | length }}", encoding="utf-8")
    assert rendered(folder) == "jinja Ü 1"


def test_templates_besides_the_default_one(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"default": "D", "tool_use": "T"}}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat(MESSAGE) == tokenizer.render_chat(MESSAGE, chat_template="default") == "D"
    assert tokenizer.render_chat(MESSAGE, tools=[]) == tokenizer.render_chat(MESSAGE, chat_template="tool_use") == "T"
    assert tokenizer.render_chat(MESSAGE, chat_template="text {{ messages|length }}") == "text 1"
    written = json.loads(tokenizer.transformers_config(64))["chat_template"]
    assert written == [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("R", encoding="utf-8")
    (folder / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfJ\r\nJ")  # files come before the configuration
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat(MESSAGE, tools=[]) == "J\nJ"
    assert tokenizer.render_chat(MESSAGE, chat_template="rag") == "R"


def test_broken_template_files_are_one_sentence(folder):
    for content in (b"{", b"[]", b"\xff"):
        (folder / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer_config.json is not a JSON object"):
            Tokenizer.from_folder(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ 1 }}")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja is not UTF-8 text"):
        Tokenizer.from_folder(folder)


# ---- chats ----

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]
# Facts sheet §3.4.
RENDERED = "<|endoftext|><|system|>\nS\n<|user|>\nU1\n<|assistant|>\nA1<|endoftext|>\n<|user|>\nU2\n<|assistant|>\n"


def test_golden_chat_rendering(released):
    assert released.render_chat(CHAT) == RENDERED
    assert released.render_chat(CHAT, add_generation_prompt=False) == RENDERED.removesuffix("<|assistant|>\n")
    assert released.render_chat(CHAT[1:2], bos_token="<s>") == "<s><|user|>\nU1\n<|assistant|>\n"
    assert released.encode_chat([{"role": "user", "content": "Hello"}]) == [
        50279, 29, 93, 4537, 49651, 187, 12092, 187, 29, 93, 515, 5567, 49651, 187,
    ]  # fmt: skip


INDENTED_TEMPLATE = """\
{%- for message in messages %}
    {% if message.role == 'user' %}
U: {{ message.content | trim }}
    {% else %}
  A: {{ message.content }}{{ eos_token }}

    {% endif %}
{% endfor %}
"""


@pytest.mark.parametrize("template", [OLMOE_CHAT_TEMPLATE, INDENTED_TEMPLATE], ids=["olmoe", "indented"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_agree_with_transformers(olmoe_tokenizer_file, template, add_generation_prompt):
    ours = Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(EOS,), chat_template=template)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(olmoe_tokenizer_file),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=template,
    )
    chats = [
        CHAT,
        CHAT[1:],
        CHAT[:3],
        [{"role": "user", "content": "  code:\n\n    x = {{ 1 }} {% if %}\n  "}],
        [{"role": "user", "content": ""}, {"role": "assistant", "content": "日本語 😀 e\u0301"}],
    ]
    for chat in chats:
        options = {"add_generation_prompt": add_generation_prompt}
        assert ours.render_chat(chat, **options) == theirs.apply_chat_template(chat, tokenize=False, **options)
        expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
        assert ours.encode_chat(chat, **options) == expected


def test_eos_is_written_by_id_when_its_name_is_another(released, swapped):
    assert swapped.encode("<|endoftext|>") == [0]  # the trap: by name one gets another id
    assert swapped.decode([EOS], skip_special_tokens=False) == "|||IP_ADDRESS|||"
    ids = swapped.encode_chat(CHAT)
    assert ids == released.encode_chat(CHAT)
    assert ids[0] == EOS
    assert ids.count(EOS) == 2
    assert 0 not in ids
    assert swapped.is_special(EOS)
    assert swapped.decode(ids) == RENDERED.replace("<|endoftext|>", "")


def test_a_chat_without_eos_ids_has_no_marks(tokenizer_file):
    tokenizer = Tokenizer.from_file(tokenizer_file)
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == RENDERED.replace("<|endoftext|>", "")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "A chat needs at least one message."),
        (["Hi"], "A chat message needs a role and a text content, not 'Hi'."),
        ([{"role": "user"}], "A chat message needs a role and a text content"),
        ([{"role": "user", "content": None}], "A chat message needs a role and a text content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "A chat message needs a role and a text content"),
        ([{"content": "Hi"}], "Unknown chat role None; use system, user or assistant."),
        ([{"role": 3, "content": "Hi"}], "Unknown chat role 3; use system, user or assistant."),
        ({"role": "user", "content": "Hi"}, "A chat is a list of messages with role and content, not dict."),
        ("Hi", "A chat is a list of messages with role and content, not str."),
    ],
)
def test_wrong_messages_are_one_sentence(released, messages, sentence):
    for call in (released.render_chat, released.encode_chat):
        with pytest.raises(TokenizerError, match="^" + sentence):
            call(messages)


def test_private_use_characters_are_text_like_any_other(released, raw):
    chat = [{"role": "user", "content": "a\ue0f0\ue0f1b"}]
    ids = released.encode_chat(chat)
    assert ids == raw.encode(released.render_chat(chat), add_special_tokens=False).ids
    assert EOS not in ids[1:]


def test_a_role_that_olmoe_does_not_know_is_left_out_with_a_warning(released, caplog):
    chat = [{"role": "developer", "content": "D"}, {"role": "user", "content": "U"}, {"role": "tool", "content": "22"}]
    assert released.render_chat(chat) == "<|endoftext|><|user|>\nU\n<|assistant|>\n"  # as transformers renders it
    warned = [record.getMessage() for record in caplog.records]
    assert warned == [
        f"OLMoE's chat template leaves out messages of the role '{role}'" for role in ("developer", "tool")
    ]
    released.render_chat(chat)  # as files of chats do, thousands of times
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only two turns') }}", "only two turns."),
        ("{% if %}", "Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_a_template_that_fails_is_one_sentence(tokenizer_file, template, reason):
    tokenizer = Tokenizer.from_file(tokenizer_file, chat_template=template)
    with pytest.raises(TokenizerError, match=f"^The chat template refuses these messages: .*{reason}") as caught:
        tokenizer.render_chat(CHAT)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith("..")


def test_what_is_far_too_long_is_seen_from_its_beginning(tokenizer):
    text = "Once upon a time there was a little girl. " * 200
    tokens = len(tokenizer.encode(text))
    found = tokenizer.certain_tokens(text, 50)
    assert 50 < found <= tokens
    assert tokenizer.encode(text)[:found] == tokenizer.encode(
        text[: len(tokenizer.decode(tokenizer.encode(text)[:found]))]
    )
    assert tokenizer.certain_tokens(text, tokens) is None
    assert tokenizer.certain_tokens("a" * 100000, 10) is None  # no place that certainly divides it
    assert tokenizer.certain_tokens(" " * 100000, 10) is None
