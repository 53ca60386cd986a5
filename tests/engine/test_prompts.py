"""Every form of prompts gives the same ids, and anything else is refused in one sentence."""

from __future__ import annotations

import collections
import decimal
import pathlib
import types

import numpy as np
import pytest
import torch

from configurations import VOCAB_SIZE
from conftest import make_model
from olmoe.engine.llm import LLM
from olmoe.engine.prompts import Chat, read_params, read_prompts
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import TokenizerError, UserError

IDS = [5, 9, 7]
OTHER = [8, 6]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "dog"}]
PARAMS = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def llm(tokenizer) -> LLM:
    return LLM.from_parts(make_model(), tokenizer)


class Encoding(collections.UserDict):
    """Like transformers' BatchEncoding: a mapping that is not a dict."""


ONE = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(5, 8),
    "generator": (i for i in IDS),
    "deque": collections.deque(IDS),
    "list of one": [IDS],
    "numpy int64": np.array(IDS),
    "numpy uint16": np.array(IDS, dtype=np.uint16),
    "numpy uint64": np.array(IDS, dtype=np.uint64),
    "numpy objects": np.array(IDS, dtype=object),
    "numpy scalars": [np.int32(i) for i in IDS],
    "zero-dimensional arrays": [np.array(i) for i in IDS],
    "torch": torch.tensor(IDS),
    "torch int32": torch.tensor(IDS, dtype=torch.int32),
    "torch uint8": torch.tensor(IDS, dtype=torch.uint8),
    "zero-dimensional tensors": list(torch.tensor(IDS)),
    "a row": np.array([IDS]),
    "a row of torch": torch.tensor([IDS]),
    "list of a tensor": [torch.tensor(IDS)],
    "list of a row": [torch.tensor([IDS])],
    "dict": {"input_ids": IDS},
    "dict of rows": {"input_ids": [IDS]},
    "dict of an array": {"input_ids": np.array(IDS)},
    "dict of a tensor": {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
    "list of a dict": [{"input_ids": IDS, "attention_mask": None}],
    "mapping": Encoding(input_ids=torch.tensor([IDS])),
    "read-only mapping": types.MappingProxyType({"input_ids": IDS}),
    "padded left": {"input_ids": [1, 1, *IDS], "attention_mask": [0, 0, 1, 1, 1]},
    "padded right": {"input_ids": torch.tensor([[*IDS, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
    "mask of tensors": {"input_ids": [[*IDS, 1]], "attention_mask": [torch.tensor([1, 1, 1, 0])]},
    "mask of scalars": {"input_ids": [*IDS, 1], "attention_mask": list(torch.tensor([1, 1, 1, 0]))},
    "mask of bools": {"input_ids": np.array([IDS + IDS]), "attention_mask": np.array([[True] * 3 + [False] * 3])},
    "mask of floats": {"input_ids": [[*IDS, 1]], "attention_mask": [[1.0, 1.0, 1.0, 0.0]]},
    "further keys": {"input_ids": IDS, "token_type_ids": [0, 0, 0], "labels": IDS},
}


@pytest.mark.parametrize("name", ONE)
def test_a_single_prompt_is_read_in_every_form(name):
    value = ONE[name]
    expected = list(value) if name == "range" else IDS
    assert read_prompts(value) == [expected]
    assert all(type(i) is int for i in expected)


SEVERAL = {
    "lists": [IDS, OTHER],
    "generator": (ids for ids in (IDS, OTHER)),
    "arrays": (np.array(IDS), torch.tensor(OTHER)),
    "generators": [(i for i in IDS), iter(OTHER)],
    "encodings": [{"input_ids": IDS}, Encoding(input_ids=torch.tensor([OTHER]))],
    "encoding of lists": {"input_ids": [IDS, OTHER], "attention_mask": [[1, 1, 1], [1, 1]]},
    "encoding of tensors": {"input_ids": [torch.tensor(IDS), torch.tensor(OTHER)]},
    "padded encoding": Encoding(
        input_ids=torch.tensor([IDS, [1, *OTHER]]), attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]])
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_prompts_are_read_in_every_form(name):
    assert read_prompts(SEVERAL[name]) == [IDS, OTHER]


def test_a_two_dimensional_array_has_one_prompt_per_row():
    for array in (np.array([IDS, IDS[::-1]]), torch.tensor([IDS, IDS[::-1]])):
        assert read_prompts(array) == [IDS, IDS[::-1]]
    assert read_prompts(np.zeros((0, 3), dtype=np.int64)) == []


def test_texts_are_tokenized():
    assert read_prompts("dog") == ["dog"]
    assert read_prompts(np.str_("dog")) == ["dog"]
    for several in (["dog", "cat"], ("dog", "cat"), (t for t in ("dog", "cat")), np.array(["dog", "cat"])):
        assert read_prompts(several) == ["dog", "cat"]
    assert read_prompts({"dog": 1, "cat": 2}.keys()) == ["dog", "cat"]


def test_chats_are_recognized():
    for one in (CHAT, tuple(CHAT), iter(CHAT), [CHAT], [types.MappingProxyType(m) for m in CHAT]):
        (read,) = read_prompts(one)
        assert isinstance(read, Chat)
        assert [dict(message) for message in read.messages] == CHAT
    assert read_prompts([CHAT, "dog", IDS, CHAT[1:]]) == [Chat(CHAT), "dog", IDS, Chat(CHAT[1:])]


WHAT = (
    "^A prompt is a text, a list or array of integer ids, a list of chat messages, or an encoding with input_ids, not "
)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (b"dog", WHAT + r"b'dog' \(bytes\); decode bytes first\.$"),
        (bytearray(b"dog"), WHAT + r"bytearray\(b'dog'\) \(bytearray\); decode"),
        ([b"dog"], WHAT + r"b'dog' \(bytes\); decode bytes first \(prompts\[0\]\)\.$"),
        (None, WHAT + r"None\.$"),
        (5, WHAT + r"5 \(int\)\.$"),
        (5.5, WHAT + r"5\.5 \(float\)\.$"),
        (True, WHAT + r"True \(bool\)\.$"),
        (object, WHAT),
        (pathlib.Path("dog"), WHAT + r"PosixPath\('dog'\)"),
        ({"dog", "cat"}, WHAT),
        (frozenset(IDS), WHAT),
        ({}, WHAT + r"a dict of nothing\.$"),
        ({"dog": 1}, WHAT + r"a dict of dog\.$"),
        ({"prompt": "dog"}, WHAT + r"a dict of prompt\.$"),
        (CHAT[0], WHAT + r"a dict of role, content; put the message into a list\.$"),
        ([True, False], r"^Token ids are integers, not True \(bool\)\.$"),
        ([5, True], r"^Token ids are integers, not True \(bool\)\.$"),
        ([np.bool_(True)], r"^Token ids are integers, not .*True.* \(bool.*\)\.$"),
        ([1.0, 2.0], r"^Token ids are integers, not 1\.0 \(float\)\.$"),
        ([5, 6.0], r"^Token ids are integers, not 6\.0 \(float\)\.$"),
        ([5, None], r"^Token ids are integers, not None\.$"),
        ([5, "dog"], r"^Token ids are integers, not 'dog' \(str\)\.$"),
        ([5, [6]], r"^Token ids are integers, not \[6\] \(list\)\.$"),
        ([5j], r"^Token ids are integers, not 5j \(complex\)\.$"),
        ([decimal.Decimal(5)], r"^Token ids are integers, not Decimal\('5'\) \(Decimal\)\.$"),
        (["dog", 5], WHAT + r"5 \(int\) \(prompts\[1\]\)\.$"),
        (["dog", None], WHAT + r"None \(prompts\[1\]\)\.$"),
        ([None], WHAT),
        ([["dog"]], WHAT + r"'dog' \(str\) \(prompts\[0\]\)\.$"),
        ([[IDS]], WHAT + r"\[5, 9, 7\] \(list\) \(prompts\[0\]\)\.$"),
        ([IDS, [1.5]], r"^Token ids are integers, not 1\.5 \(float\) \(prompts\[1\]\)\.$"),
        (np.array(IDS, dtype=np.float32), r"^Token ids are integers, not an array of float32\.$"),
        (np.array([True]), r"^Token ids are integers, not an array of bool\.$"),
        (torch.tensor([1.0]), r"^Token ids are integers, not an array of float32\.$"),
        (torch.tensor([[True]]), r"^Token ids are integers, not an array of bool\.$"),
        (torch.tensor([1j]), r"^Token ids are integers, not an array of complex64\.$"),
        (np.array([b"dog"]), r"^Token ids are integers, not an array of \|S3\.$"),
        (np.array(["2020"], dtype="datetime64[D]"), r"^Token ids are integers, not an array of datetime64\[D\]\.$"),
        ([torch.tensor(IDS), torch.tensor([0.5])], r"not an array of float32 \(prompts\[1\]\)\.$"),
        (np.array(5), r"^An array of token ids has one dimension, or two for several prompts, not shape \(\)\.$"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"not shape \(1, 2, 3\)\.$"),
        ([torch.tensor([IDS, IDS])], r"^One of several prompts is one row of ids, not 2; pass each row by itself \(p"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), r"^A tensor of token ids cannot be read \("),
        ({"input_ids": "dog"}, WHAT + r"'dog' \(str\)\.$"),
        ({"input_ids": ["dog"]}, WHAT + r"'dog' \(str\)\.$"),
        ({"input_ids": None}, WHAT + r"None\.$"),
        ({"input_ids": [1.5]}, r"^Token ids are integers, not 1\.5"),
        ({"input_ids": torch.rand(1, 3)}, r"^Token ids are integers, not an array of float32\.$"),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, r"^input_ids and attention_mask differ in shape; take both"),
        ({"input_ids": [IDS, OTHER], "attention_mask": [[1, 1, 1]]}, "^input_ids and attention_mask differ in shape"),
        ({"input_ids": IDS, "attention_mask": [1, 2, 1]}, r"^An attention_mask has a 0 or a 1 for each id, not 2 "),
        ({"input_ids": IDS, "attention_mask": ["1", "1", "1"]}, r"has a 0 or a 1 for each id, not '1' "),
        ({"input_ids": IDS, "attention_mask": 2}, r"^An attention_mask has a 0 or a 1 for each id, not 2 "),
        ({"input_ids": IDS, "attention_mask": 1}, "^input_ids and attention_mask differ in shape"),
        ({"input_ids": IDS, "attention_mask": "111"}, r"^An attention_mask has a 0 or a 1 for each id, not '111' "),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1], 1]}, "^input_ids and attention_mask differ in shape"),
        ({"input_ids": [IDS], "attention_mask": torch.zeros(1, 1, 3, 3)}, r"^An attention_mask has a 0 or a 1"),
        ([CHAT[0], "dog"], r'^A chat is a list of messages such as \{"role": "user".*holds \'dog\' \(str\)\.$'),
        ([CHAT[0], {"content": "x"}], r"^A chat is a list of messages"),
    ],
    ids=repr,
)  # fmt: skip
def test_everything_else_is_refused_in_one_sentence(llm, value, sentence):
    for entry in (llm.generate, llm.stream):
        with pytest.raises(UserError, match=sentence) as caught:
            entry(value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [[]],
        np.array([], dtype=np.int64),
        np.array([]),
        torch.zeros(1, 0),
        {"input_ids": []},
        {"input_ids": [[]]},
        {"input_ids": torch.zeros(1, 0), "attention_mask": torch.zeros(1, 0)},
        {"input_ids": IDS, "attention_mask": [0, 0, 0]},
    ],
    ids=repr,
)
def test_a_prompt_without_ids_is_empty(llm, value):
    for entry in (llm.generate, llm.stream):
        with pytest.raises(UserError, match=r"^The prompt is empty; give at least one character\.$"):
            entry(value)
    with pytest.raises(UserError, match="^The prompt is empty"):
        llm.stream([])


@pytest.mark.parametrize("ids", [[5, -1], [5, VOCAB_SIZE], [5, 2**70]], ids=str)
def test_ids_outside_the_vocabulary_are_refused(llm, ids):
    forms = [ids, {"input_ids": ids}, *([np.array(ids), torch.tensor(ids)] if max(ids) < 2**63 else [])]
    for value in forms:
        for entry in (llm.generate, llm.stream):
            with pytest.raises(UserError, match=rf"^The prompt holds the id {ids[1]}, outside the vocabulary of"):
                entry(value)


# ---- through the model ----


def test_every_form_gives_the_completion_of_its_ids(llm, tokenizer):
    texts = ["The dog", "ran to the park"]
    ids = [tokenizer.encode(text) for text in texts]
    expected = llm.generate(texts, PARAMS)
    width = max(map(len, ids))
    padded = torch.tensor([[1] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    for value in (ids, [np.array(row) for row in ids], {"input_ids": padded, "attention_mask": mask}):
        assert llm.generate(value, PARAMS) == expected
    for value in (torch.tensor(ids[0]), [ids[0]], {"input_ids": ids[0]}, ids[0]):
        stream = llm.stream(value, PARAMS)
        assert "".join(stream) == expected[0].text
        assert stream.completion == expected[0]


def test_the_output_of_a_transformers_tokenizer_is_accepted(llm, tokenizer, tokenizer_file):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token=tokenizer._added.get(1, "!"))
    texts = ["The dog", "ran to the park"]
    expected = llm.generate(texts, PARAMS)
    for side in ("left", "right"):
        for kind in (None, "np", "pt"):
            encoding = theirs(texts, padding=True, padding_side=side, return_tensors=kind)
            assert llm.generate(encoding, PARAMS) == expected
    assert llm.generate(theirs(texts[0]), PARAMS) == expected[:1]
    assert llm.generate([theirs(text) for text in texts], PARAMS) == expected
    assert "".join(llm.stream(theirs(texts[0], return_tensors="pt"), PARAMS)) == expected[0].text


def test_chats_are_rendered_by_the_template(llm, tokenizer):
    (expected,) = llm.generate(tokenizer.encode_chat(CHAT), PARAMS)
    assert llm.generate(CHAT, PARAMS) == llm.chat(CHAT, PARAMS) == [expected]
    assert llm.generate([CHAT, "dog"], PARAMS) == [expected, *llm.generate("dog", PARAMS)]
    assert "".join(llm.stream(CHAT, PARAMS)) == expected.text
    for several in ([CHAT, CHAT[1:]], (chat for chat in (CHAT, CHAT[1:]))):
        assert llm.chat(several, PARAMS) == [expected, *llm.chat(CHAT[1:], PARAMS)]


@pytest.mark.parametrize("value", ["dog", [], None, 5, CHAT[0], ["dog"], [IDS], [CHAT, "dog"], [CHAT, []], b"dog"])
def test_invalid_chats_are_refused(llm, value):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        llm.chat(value)


def test_a_chat_that_the_template_refuses_keeps_its_error(llm):
    with pytest.raises(TokenizerError, match=r"\(prompts\[1\]\)\.$"):
        llm.generate(["dog", [{"role": "user", "content": 5}]])


def test_a_stream_accepts_one_prompt_only(llm):
    for value in (["dog", "cat"], np.array([IDS, IDS]), [CHAT, CHAT], {"input_ids": [IDS, OTHER]}):
        with pytest.raises(UserError, match=r"^A stream continues one prompt, not 2; use generate for several\.$"):
            llm.stream(value)


# ---- parameters ----


def test_parameters_for_all_or_for_each():
    one, default = SamplingParams(top_k=3), SamplingParams()
    assert read_params(None, 2) == [default] * 2
    assert read_params(one, 2) == [one] * 2
    assert read_params([one, None], 2) == [one, default]
    assert read_params((p for p in (one, one)), 2) == [one] * 2


@pytest.mark.parametrize(
    "value", [5, "greedy", {"temperature": 0}, 0.7, [5], ["a"], [SamplingParams(), {}], False, b""]
)
def test_invalid_sampling_parameters_are_refused(llm, value):
    for entry in (llm.generate, llm.stream, lambda _, params: llm.chat(CHAT, params)):
        with pytest.raises(UserError, match=r"^Sampling parameters are a SamplingParams[^\n]*\.$"):
            entry("dog", value)
