from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
import threading

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olmoe.engine import structured
from olmoe.errors import UserError
from olmoe.tokenizer import Tokenizer
from written_texts import accepts, allowed, write

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 'é"\\']}, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags", "born"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def released(olmoe_tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50279,), pad_id=1)


# ---- texts follow the grammar ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("which", ["tokenizer", "released"])
def test_output_follows_a_json_schema(which, seed, request):
    tokenizer = request.getfixturevalue(which)
    value = json.loads(write(structured.json_schema(PERSON, tokenizer), tokenizer, seed))
    jsonschema.validate(value, PERSON)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", value["born"])


def test_a_schema_may_be_given_as_text(tokenizer):
    grammar = structured.json_schema(json.dumps(PERSON), tokenizer)
    jsonschema.validate(json.loads(write(grammar, tokenizer)), PERSON)


@pytest.mark.parametrize("seed", range(3))
def test_any_json_object_can_be_requested(tokenizer, seed):
    assert isinstance(json.loads(write(structured.json_object(tokenizer), tokenizer, seed)), dict)


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"\d{3}-[a-f]{2,4}", ["123-ab", "000-ffff"], ["12-ab", "123-a", "123-abg", "٣٣٣-ab"]),
        (r"^(yes|no)$", ["yes", "no"], ["maybe", "yesno", ""]),
        ("a/b\\n", ["a/b\n"], ["a/b"]),
        ('[^"]{1,4}', ["日本", "é😀"], ['"']),
        (r"\w+@\w+\.com", ["é@b.com"], ["@b.com"]),
        ("", [""], ["a"]),
    ],
)
def test_a_regex_must_match_the_whole_text(released, pattern, good, bad):
    grammar = structured.regex(pattern, released)
    assert [accepts(grammar, released, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_under_a_regex_match_it(released, seed):
    pattern = r"(\d{1,3}\.){3}\d{1,3}|[A-Z][a-z]{2,8}!"
    assert re.fullmatch(pattern, write(structured.regex(pattern, released), released, seed))


def test_output_is_one_of_several_choices(released):
    texts = ["red", "red wine", 'a "quote"', "é日😀", "line\nend\t\\", "\x00\x7f", " "]
    grammar = structured.choice(texts, released)
    assert all(accepts(grammar, released, text) for text in texts)
    assert not any(accepts(grammar, released, text) for text in ["re", "red ", "blue", ""])
    assert {write(grammar, released, seed) for seed in range(20)} <= set(texts)


def test_a_choice_that_is_a_prefix_of_another_may_end_or_continue(released):
    state = structured.choice(["red", "red wine"], released).start()
    for token_id in released.encode("red"):
        state.accept(token_id)
    assert not state.finished
    assert 50279 in allowed(state, released)
    assert released.encode(" wine")[0] in allowed(state, released)


@pytest.mark.parametrize(
    "text",
    [
        'start: "(" start ")" | "x"',
        'root ::= "(" root ")" | "x"',
        '%llguidance {}\nstart: "(" start ")" | "x"  // a <comment>\n',
    ],
)
def test_lark_and_gbnf_grammars_are_followed(released, text):
    grammar = structured.grammar(text, released)
    assert all(accepts(grammar, released, good) for good in ["x", "(x)", "(((x)))"])
    assert not any(accepts(grammar, released, bad) for bad in ["(x", "y", ""])


# ---- white space, ends and special tokens ----


def test_white_space_is_bounded(released):
    grammar = structured.json_object(released)
    assert accepts(grammar, released, '{"a": 1,\n    "b": [ 1 ]}')
    for text in ['{"a":         1}', "{" + " " * 9 + "}", ' {"a":1}', '{"a":1}\n', "{" + "\n\t" * 30]:
        assert not accepts(grammar, released, text), text


def test_a_schema_cannot_lift_the_bound_on_white_space(released):
    loose = {"type": "object", "x-guidance": {"whitespace_pattern": " *", "whitespace_flexible": True}}
    assert not accepts(structured.json_schema(loose, released), released, '{"a":         1}')
    none = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    assert not accepts(structured.json_schema(none, released), released, '{"a": 1}')
    assert accepts(structured.json_schema(none, released), released, '{"a":1}')


def test_a_text_is_finished_when_only_eos_can_follow(released):
    state = structured.choice(["yes"], released).start()
    assert not state.finished
    for token_id in released.encode("yes"):
        state.accept(token_id)
    assert state.finished


def test_eos_is_allowed_exactly_where_the_text_may_end(released):
    state = structured.regex("a+", released).start()
    assert 50279 not in allowed(state, released)
    state.accept(released.encode("a")[0])
    assert 50279 in allowed(state, released)
    state.accept(50279)
    assert state.finished


def test_special_tokens_never_appear_inside_a_text(olmoe_tokenizer_file):
    # 1 is padding; 50277 is special because it is an eos id; ids beyond the vocabulary do not exist.
    tokenizer = Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50279, 50277, 99999), pad_id=1)
    state = structured.regex(r"(.|\n)*", tokenizer).start()
    found = set(allowed(state, tokenizer))
    assert {50277, 50279} <= found
    assert 1 not in found
    assert max(found) < tokenizer.vocab_size
    assert len(found) > 40_000
    for name in ("<|endoftext|>", "<|padding|>", "e\u0301", "|||EMAIL_ADDRESS|||"):
        # A required text, even if the tokenizer has a special token for it or composes its characters.
        assert write(structured.choice([name], tokenizer), tokenizer) == name


def test_a_tokenizer_without_eos_is_supported(olmoe_tokenizer_file):
    tokenizer = Tokenizer.from_file(olmoe_tokenizer_file)
    state = structured.regex("a+b", tokenizer).start()
    assert max(allowed(state, tokenizer)) < tokenizer.vocab_size
    for token_id in tokenizer.encode("ab"):
        state.accept(token_id)
    assert state.finished


def test_a_mask_of_another_length_is_filled_completely(released):
    state = structured.regex("(.|\n)*", released).start()
    short, long = np.full(4, 7, dtype=np.int32), np.full(2000, 7, dtype=np.int32)
    state.fill(short)
    state.fill(long)
    assert (short == long[:4]).all()
    assert not long[-(-released.vocab_size // 32) :].any()


def test_a_disallowed_token_is_reported_at_the_next_mask(released):
    state = structured.regex("ab", released).start()
    state.accept(released.encode("x")[0])
    assert not state.finished
    with pytest.raises(UserError, match="the grammar does not allow"):
        allowed(state, released)


def test_characters_are_never_split(released):
    """A byte that begins a character can only be followed by its other bytes."""
    state = structured.regex("[😀é]x", released).start()
    for byte in "😀".encode():
        token_id = next(i for i in range(released.vocab_size) if released.token_bytes(i) == bytes([byte]))
        assert token_id in allowed(state, released)
        state.accept(token_id)
    assert {released.token_bytes(i) for i in allowed(state, released)} == {b"x"}


# ---- compiled grammars are kept, and shared between threads ----


def test_a_grammar_is_compiled_once(released, monkeypatch):
    built = []
    build = structured._Compiler._build
    monkeypatch.setattr(structured._Compiler, "_build", lambda self, *a: built.append(a) or build(self, *a))
    for _ in range(3):
        structured.regex("compiled+once", released).start()
    assert len(built) == 1
    for i in range(40):
        structured.regex(f"evicted{i}", released)
    assert len(structured._compiler(released)._masters) <= 16
    assert accepts(structured.regex("compiled+once", released), released, "compiledonce")
    assert len(built) == 42


def test_an_evicted_grammar_still_starts(released):
    grammar = structured.regex("kept|out", released)
    for i in range(40):
        structured.regex(f"other{i}", released)
    assert accepts(grammar, released, "out")


def test_texts_with_one_grammar_are_independent(released):
    grammar = structured.regex("[ab]{4}", released)
    first, second = grammar.start(), grammar.start()
    first.accept(released.encode("aaaa")[0])
    assert accepts(grammar, released, "abab")
    assert len(allowed(second, released)) > len(allowed(first, released)) > 0


def test_a_full_shared_lexer_fails_no_request(released):
    """States visited by texts accumulate in their shared lexer, which is bounded."""
    grammar = structured.regex(r"(\p{L}{1,500}\s){500}", released)
    for seed in range(4):
        random, state = np.random.default_rng(seed), grammar.start()
        for _ in range(60):
            state.accept(int(random.choice(allowed(state, released))))


def test_grammars_work_from_many_threads(released):
    failures = []

    def work(seed: int) -> None:
        try:
            for i in range(6):
                pattern = f"[a-z]{{{1 + (seed + i) % 4}}}!"
                assert re.fullmatch(pattern, write(structured.regex(pattern, released), released, seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_compiled_grammars_are_freed_with_their_tokenizer(olmoe_tokenizer_file):
    tokenizer = Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50279,))
    structured.regex("a", tokenizer)
    count = len(structured._compilers)
    del tokenizer
    gc.collect()
    assert len(structured._compilers) == count - 1


def test_without_the_library_the_error_names_the_remedy(released, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=re.escape('pip install "olmoe[serve]"')):
        structured.regex("ab", released)


# ---- any schema ----

_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6)
_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "uuid"}]),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 8)),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-999, 999), st.integers(0, 99)
    ),
    st.builds(lambda a: {"type": "number", "minimum": a, "maximum": a + 1}, st.integers(-9, 9)),
    st.builds(lambda values: {"enum": values}, st.lists(_NAMES, min_size=1, max_size=3)),
    st.builds(
        lambda value: {"const": value}, st.one_of(_NAMES, st.integers(-(2**53), 2**53), st.booleans(), st.none())
    ),
)  # fmt: skip


def _objects(inner):
    def build(properties: dict, optional: int) -> dict:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties)[optional:],
            "additionalProperties": False,
        }

    return st.builds(build, st.dictionaries(_NAMES, inner, max_size=3), st.integers(0, 2))


_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=_SCHEMAS, seed=st.integers(0, 2**31))
def test_texts_under_any_schema_are_valid(tokenizer, schema, seed):
    text = write(structured.json_schema(schema, tokenizer), tokenizer, seed, most=5000)
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=8), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_texts_under_any_choice_are_among_the_choices(tokenizer, texts, seed):
    assert write(structured.choice(texts, tokenizer), tokenizer, seed) in texts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), kind=st.sampled_from(["regex", "grammar", "json_schema"]))
def test_any_input_is_used_or_refused(tokenizer, text, kind):
    with contextlib.suppress(UserError):
        getattr(structured, kind)(text, tokenizer).start()
