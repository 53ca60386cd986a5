"""Users' mistakes, limits of the compiler, and malicious grammars."""

from __future__ import annotations

import contextlib
import json
import sys
import time

import jsonschema
import numpy as np
import pytest

from olmoe.engine import structured
from olmoe.errors import UserError
from olmoe.tokenizer import Tokenizer
from written_texts import accepts, allowed, write


@pytest.fixture(scope="module")
def released(olmoe_tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50279,), pad_id=1)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda t: structured.regex("(a", t), "The regex '(a' cannot be used: unclosed group."),
        (lambda t: structured.regex("(?=a)b", t), "look-around"),
        (lambda t: structured.regex("a" * 5000, t), "The regex has 5000 characters; at most 4096 are supported."),
        (lambda t: structured.regex(3, t), "The regex must be a text, not 3."),
        (lambda t: structured.regex("\ud800", t), "half a character"),
        (lambda t: structured.regex("(" * 1500 + "a" + ")" * 1500, t), "cannot be used"),
        (lambda t: structured.grammar("start: foo", t), 'unknown name: "foo"'),
        (lambda t: structured.grammar("start: a\na: a", t), "no text belongs to it"),
        (lambda t: structured.grammar("root ::= (", t), "is not GBNF"),
        (lambda t: structured.grammar("hello", t), "cannot be used"),
        (lambda t: structured.grammar("start: " + "(" * 30_000, t), "nested"),
        (lambda t: structured.grammar("root ::= " + "(" * 30_000, t), "is not GBNF"),
        (lambda t: structured.grammar("start: " + "x" * 40_000, t), "at most 32768 are supported"),
        (lambda t: structured.grammar(f"start: /{'a?' * 2050}/", t), "at most 4096 are supported"),
        (lambda t: structured.json_schema({"items": {"pattern": "a" * 5000}}, t), "a pattern of 5000 characters"),
        (lambda t: structured.json_schema({"patternProperties": {"a" * 5000: {}}}, t), "a pattern of 5000 characters"),
        (
            lambda t: structured.json_schema({"anyOf": [{"type": "string", "pattern": "a" * 4000}] * 5}, t),
            "a pattern of 4000 characters, 20000 with those before it",
        ),
        (lambda t: structured.grammar('start: "a" <|endoftext|>', t), "special token '<|endoftext|>'"),
        (lambda t: structured.grammar('start: "<b>" <[50279]>', t), "special token '<[50279]>'"),
        (lambda t: structured.choice([], t), "at least one text, not []"),
        (lambda t: structured.choice("abc", t), "at least one text, not 'abc'"),
        (lambda t: structured.choice(["a", 1], t), "at least one text, not ['a', 1]"),
        (lambda t: structured.choice(["a"] * 10_001, t), "10001 texts"),
        (lambda t: structured.json_schema({"type": "foo"}, t), "Invalid type: foo"),
        (lambda t: structured.json_schema({"$ref": "#/nope"}, t), "'/nope' does not exist"),
        (lambda t: structured.json_schema({"$ref": "http://example.com/x"}, t), "http://example.com/x"),
        (lambda t: structured.json_schema({"uniqueItems": True}, t), '["uniqueItems"]'),
        (lambda t: structured.json_schema({"type": "string", "pattern": "(a"}, t), "unclosed group"),
        (lambda t: structured.json_schema({"items": {"type": "string", "pattern": "(a{1000}){1000}"}}, t), "(a{1000})"),
        (lambda t: structured.json_schema({"type": "foo"}, t, name="Mine"), "Mine cannot be used: Invalid type: foo."),
        (lambda t: structured.json_schema("{", t), "is not JSON"),
        (lambda t: structured.json_schema([1], t), "must be an object, not [1]."),
        (lambda t: structured.json_schema({"const": 2**53 + 1}, t), "9007199254740993"),
        (lambda t: structured.json_schema({"enum": [{"a": [-(2**60)]}]}, t), "beyond 2^53"),
        (lambda t: structured.json_schema({"type": "integer", "minimum": 10**400}, t), "beyond 2^53"),
        (lambda t: structured.json_schema({"exclusiveMaximum": -(2.0**60)}, t), "beyond 2^53"),
        (lambda t: structured.json_schema(False, t), "nothing satisfies it"),
        (lambda t: structured.json_schema({"minimum": float("nan")}, t), "is not JSON"),
        (lambda t: structured.json_schema({"enum": ["x" * 200_000]}, t), "at most 131072 are supported"),
        (lambda t: structured.json_schema({"minLength": 5, "maxLength": 3, "type": "string"}, t), "minLength (5)"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_sentence(released, make, sentence):
    with pytest.raises(UserError) as caught:
        make(released)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def _nested(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("levels", [61, 300, 20_000])
def test_a_deeply_nested_schema_is_refused(released, levels):
    with pytest.raises(UserError, match="nested more than 60 levels"):
        structured.json_schema(_nested(levels), released)


def test_deeply_nested_json_text_is_refused(released):
    with pytest.raises(UserError, match="levels deep|not JSON"):
        structured.json_schema('{"items":' * 5000 + "{}" + "}" * 5000, released)


BOMBS = {
    "repeat": lambda t: structured.regex("(a{1000}){1000}", t),
    "repeat twice": lambda t: structured.regex("((a{1000}){1000}){1000}", t),
    "words": lambda t: structured.regex(r"(\p{L}{1,500}\s){500}", t),
    "any": lambda t: structured.regex("(.{1000}){1000}", t),
    "long": lambda t: structured.regex("a?" * 2048, t),
    "terminals": lambda t: structured.grammar("start: A\nA: " + '"a"? ' * 6000, t),
    "states": lambda t: structured.regex("(.*a.{25}|[ab]*b.{20})*", t),
    "ambiguous": lambda t: structured.grammar("start: a*\na: \"x\"* | a a", t),
    "left": lambda t: structured.grammar('start: a\na: a "x" | a a | "y" |', t),
    "rules": lambda t: structured.grammar('start: ((("a"{1000}){1000}){1000}){1000}', t),
    "and": lambda t: structured.grammar("start: A\nA: /(.*a.{12})*/ & /(.*b.{13})*/ & ~/.*(a.{11}c)/", t),
    "properties": lambda t: structured.json_schema(
        {"anyOf": [{"properties": {f"a{j}": {"minimum": j} for j in range(30)}} for i in range(80)]}, t
    ),
    "patterns": lambda t: structured.json_schema(
        {"allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}.*b{j}"} for j in range(10)]} for i in range(8)]}, t
    ),
    "loop": lambda t: structured.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, t),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_grammars_end_quickly(released, name):
    """Each is refused or runs in steps short enough not to block others; memory stays small either way."""
    before = _resident()
    start = time.perf_counter()
    with contextlib.suppress(UserError):
        state = BOMBS[name](released).start()
        random = np.random.default_rng(0)
        for _ in range(100):
            if state.finished:
                break
            state.accept(int(random.choice(allowed(state, released))))
    assert time.perf_counter() - start < 20  # about 0.5 s alone, but the machine may be busy
    assert _resident() - before < 200e6


def test_the_classic_grammar_bomb_is_refused_at_once(released):
    with pytest.raises(UserError, match="The regex '\\(a\\{1000\\}\\)\\{1000\\}' cannot be used"):
        structured.regex("(a{1000}){1000}", released)


def _resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.fixture(autouse=True)
def _linux(request):
    if "hostile" in request.node.name and sys.platform != "linux":
        pytest.skip("reads /proc")


def test_lenient_schemas_ignore_unsupported_keywords(released, caplog):
    schema = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}, "maxItems": 2}
    grammar = structured.json_schema(schema, released, strict=False)
    assert "uniqueItems" in caplog.text
    assert json.loads(write(grammar, released)) in (
        [],
        *([a] for a in (1, 2)),
        *([a, b] for a in (1, 2) for b in (1, 2)),
    )


def test_annotations_in_a_schema_are_accepted(released):
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "integer", "format": "int32"},
            "uniqueItems": {
                "type": "array",
                "uniqueItems": False,
                "items": {"const": {"format": "byte"}},
                "maxItems": 1,
            },
        },
        "required": ["format", "uniqueItems"],
        "additionalProperties": False,
    }
    assert accepts(
        structured.json_schema(schema, released), released, '{"format": 3, "uniqueItems": [{"format": "byte"}]}'
    )


@pytest.mark.parametrize("bound", [2**63 - 1, 2**64 + 1, 2**53 + 1, 10**400, 1e300])
def test_large_bounds_are_enforced(released, bound):
    """The compiler only knows float64 and int64."""
    schema = {"type": "integer", "minimum": -bound, "maximum": bound}
    grammar = structured.json_schema(schema, released)
    for seed in range(5):
        jsonschema.validate(json.loads(write(grammar, released, seed)), schema)
    assert accepts(grammar, released, "-9007199254740992")
    assert not accepts(grammar, released, str(int(bound) + 1))
