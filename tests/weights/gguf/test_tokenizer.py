"""`tokenizer.json` to GGUF's metadata and back: the same ids for every text, for the released and the shipped one."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from gguf_files import MERGES, TOKENS, TYPES
from olmoe.errors import TokenizerError
from olmoe.io import hub
from olmoe.tokenizer import Tokenizer
from olmoe.weights.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    chat_template,
    to_metadata,
    to_tokenizer_json,
)
from sentences import refused

TEXTS = [
    "Bitcoin is",
    "Once upon a time, there was a girl; she didn't like 12345 or 3.14!",
    "<|endoftext|><|user|>\nHello\n<|assistant|>\n",
    "|||IP_ADDRESS||| and |||EMAIL_ADDRESS|||, |||PHONE_NUMBER||| <|padding|>",
    "def f(x):\n" + "".join(" " * n + "x\n" for n in range(30)),
    "\t\t tabs\r\n\r\n\u00a0nbsp \u2028",
    "naïve café — “quotes” 日本語 한국어 العربية 😀👩‍👩‍👧",
    "e\u0301 decomposed \u1e9b\u0323",
    "",
    " ",
    "\x00\x01\x7f",
]


@pytest.fixture(scope="module", params=["released", "shipped"])
def original(request, olmoe_tokenizer_file) -> tuple[str, int]:
    """A tokenizer.json, and the model's vocabulary rows."""
    if request.param == "released":
        return olmoe_tokenizer_file.read_text(encoding="utf-8"), 50304
    return (hub.SHIPPED / "tokenizer.json").read_text(encoding="utf-8"), 4096


@pytest.fixture(scope="module")
def metadata(original) -> dict:
    return to_metadata(*original)


def test_the_way_back_gives_the_same_ids(original, metadata, tmp_path):
    (tmp_path / "a.json").write_text(original[0], encoding="utf-8")
    (tmp_path / "b.json").write_text(to_tokenizer_json(metadata, original[1]), encoding="utf-8")
    first, second = (Tokenizer.from_file(tmp_path / name) for name in ("a.json", "b.json"))
    chance = random.Random(0)
    alphabet = [c for text in TEXTS for c in text] + ["  ", "<|endoftext|>", "|||IP_ADDRESS|||", "ing", " the"]
    texts = TEXTS + ["".join(chance.choices(alphabet, k=40)) for _ in range(300)]
    assert first.encode_batch(texts) == second.encode_batch(texts)
    assert first.vocab_size == second.vocab_size
    for i in range(first.vocab_size):
        assert (first.token_bytes(i), first.is_special(i)) == (second.token_bytes(i), second.is_special(i))


def test_the_way_back_gives_the_same_contents(original, metadata):
    first, second = json.loads(original[0]), json.loads(to_tokenizer_json(metadata, original[1]))
    for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder"):
        assert first[key] == second[key]
    added = {token["content"]: token["id"] for token in first["added_tokens"]}
    assert first["model"]["vocab"] | added == second["model"]["vocab"]


def test_metadata_are_what_llama_cpp_wants(original, metadata):
    rows = original[1]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (len(tokens), len(types), len(set(tokens))) == (rows, rows, rows)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "olmo")
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert (tokens[0], types[0], tokens[1], types[1]) == ("|||IP_ADDRESS|||", USER_DEFINED, "<|padding|>", CONTROL)
    assert types[tokens.index("<|endoftext|>")] == CONTROL
    assert types[tokens.index(" " * 24)] == USER_DEFINED
    assert types[tokens.index("Ġthe")] == NORMAL
    unused = np.flatnonzero(types == UNUSED)
    assert [tokens[i] for i in unused] == [f"[PAD{i}]" for i in unused]
    assert len(unused) == (24 if rows == 50304 else 0)


def test_the_chat_template_travels(original):
    assert chat_template(to_metadata(*original, chat_template="{{ x }}")) == "{{ x }}"
    assert chat_template(to_metadata(*original)) is None


def small() -> dict:
    """The tokenizer of `gguf_files` as a tokenizer.json."""
    return json.loads(to_tokenizer_json(file_metadata(), len(TOKENS)))


def file_metadata(**changes) -> dict:
    values = {"model": "gpt2", "pre": "olmo", "tokens": list(TOKENS), "token_type": TYPES, "merges": list(MERGES)}
    return {f"tokenizer.ggml.{k}": v for k, v in (values | changes).items() if v is not None}


def test_ids_with_gaps_are_kept():
    tokenizer = small()
    assert tokenizer["model"]["vocab"] == {t: i for i, t in enumerate(TOKENS) if i < 7}
    del tokenizer["model"]["vocab"]["c"], tokenizer["model"]["vocab"]["abc"], tokenizer["model"]["merges"][1]
    metadata = to_metadata(json.dumps(tokenizer), 8)
    assert metadata["tokenizer.ggml.tokens"][3:6] == ["[PAD3]", "ab", "[PAD5]"]
    assert json.loads(to_tokenizer_json(metadata, 8))["model"]["vocab"] == tokenizer["model"]["vocab"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t["model"].update(type="Unigram"), "The tokenizer's model differs"),
        (lambda t: t["model"].update(byte_fallback=True), "The tokenizer's model differs"),
        (lambda t: t["model"].update(ignore_merges=True), "The tokenizer's model differs"),
        (lambda t: t["model"].update(continuing_subword_prefix="##"), "The tokenizer's model differs"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "The tokenizer's normalizer differs"),
        (lambda t: t.update(pre_tokenizer=None), "The tokenizer's pre_tokenizer differs"),
        (lambda t: t["pre_tokenizer"].update(use_regex=False), "The tokenizer's pre_tokenizer differs"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "The tokenizer's pre_tokenizer differs"),
        (lambda t: t["model"]["vocab"].update(z=1), "gives an id twice"),
        (lambda t: t["model"]["merges"].append(["a b", "c"]), "merges with spaces"),
        (lambda t: t["model"]["vocab"].update(z=8), "ids up to 8, but the model has only 8 vocabulary rows"),
        (lambda t: t["model"]["vocab"].update(z=-1), "gives an id twice"),
        (lambda t: t.pop("model"), "is broken (KeyError"),
        (lambda t: t["model"]["vocab"].update(z="x"), "is broken (TypeError"),
    ],
)
def test_tokenizers_that_gguf_cannot_describe_are_refused(change, sentence):
    tokenizer = small()
    change(tokenizer)
    assert sentence in refused(lambda: to_metadata(json.dumps(tokenizer), 8), TokenizerError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_broken_files_are_refused(text):
    assert "is broken" in refused(lambda: to_metadata(text, 8), TokenizerError)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model 'llama'"),
        ({"model": None}, "tokenizer.ggml.model None"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe'"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens"),
        ({"merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokens": np.arange(8)}, "lacks tokenizer.ggml.tokens"),
        ({"tokens": [*TOKENS, "x"]}, "lists 9 tokens for a model with 8 vocabulary rows"),
        ({"tokens": []}, "lists 0 tokens"),
        ({"token_type": TYPES[:5]}, "token_type is not one number for each of 8 tokens"),
        ({"token_type": TYPES.astype(np.float32)}, "token_type is not one number"),
        ({"token_type": np.full(8, 6, np.int32)}, "gives token 0 the type 6"),
        ({"tokens": ["a", "a", *TOKENS[2:]]}, "token 1 is empty or listed twice ('a')"),
        ({"tokens": ["", *TOKENS[1:]]}, "token 0 is empty or listed twice"),
        ({"merges": ["ab"]}, "merge 'ab' does not join two tokens"),
        ({"merges": ["a c"]}, "merge 'a c' does not join two tokens"),
        ({"merges": ["x y"]}, "merge 'x y' does not join two tokens"),
    ],
)
def test_broken_metadata_are_refused(changes, sentence):
    assert sentence in refused(lambda: to_tokenizer_json(file_metadata(**changes), 8), TokenizerError)


@pytest.mark.parametrize("changes", [{"pre": None}, {"pre": "gpt-2"}, {"token_type": None}])
def test_what_may_be_missing(changes):
    assert json.loads(to_tokenizer_json(file_metadata(**changes), 8))["model"]["merges"] == [["a", "b"], ["ab", "c"]]
