"""Grammars in `LLM.generate` and `stream` on the shipped model."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from olmoe import SamplingParams
from olmoe.engine import structured
from olmoe.engine.llm import LLM
from olmoe.errors import UserError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 120},
        "pets": {
            "type": "array",
            "maxItems": 2,
            "items": {
                "anyOf": [
                    {"const": "none"},
                    {
                        "type": "object",
                        "properties": {"kind": {"enum": ["cat", "dog"]}},
                        "required": ["kind"],
                        "additionalProperties": False,
                    },
                ]
            },
        },
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
PROMPTS = ["Once upon a time", "The dog", "Tell me about", "A"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def write(llm: LLM, prompt: str, params: SamplingParams):
    (completion,) = llm.generate(prompt, params)
    return completion


def params(grammar, **changes) -> SamplingParams:
    return SamplingParams(grammar=grammar, **{"max_new_tokens": 300, "temperature": 1.0, **changes})


@pytest.mark.parametrize("seed", range(5))
def test_texts_of_a_batch_are_valid(llm, seed):
    grammar = structured.json_schema(SCHEMA, llm.tokenizer)
    for completion in llm.generate(PROMPTS * 2, params(grammar, seed=seed)):
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), SCHEMA)


def test_a_text_is_the_same_alone_and_in_a_batch(llm):
    grammar = structured.json_schema(SCHEMA, llm.tokenizer)
    together = llm.generate(PROMPTS, params(grammar, seed=7))
    alone = [write(llm, prompt, params(grammar, seed=7)) for prompt in PROMPTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_every_text_of_a_batch_follows_its_own_grammar(llm):
    tokenizer = llm.tokenizer
    grammars = [
        structured.json_schema(SCHEMA, tokenizer),
        structured.regex(r"\d{4}-\d\d", tokenizer),
        structured.choice(["yes", "no"], tokenizer),
        structured.grammar('start: "(" start ")" | "x"', tokenizer),
        None,
    ]
    made = llm.generate(["Once"] * 5, [params(grammar, seed=3, max_new_tokens=120) for grammar in grammars])
    jsonschema.validate(json.loads(made[0].text), SCHEMA)
    assert re.fullmatch(r"\d{4}-\d\d", made[1].text)
    assert made[2].text in ("yes", "no")
    assert re.fullmatch(r"\(*x\)*", made[3].text) or made[3].finish_reason == "length"
    free = write(llm, "Once", SamplingParams(seed=3, temperature=1.0, max_new_tokens=120))
    assert made[4].token_ids == free.token_ids


@pytest.mark.parametrize("seed", range(3))
def test_a_streamed_text_is_valid(llm, seed):
    grammar = structured.json_schema(SCHEMA, llm.tokenizer)
    stream = llm.stream(PROMPTS[0], params(grammar, seed=seed))
    text = "".join(stream)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert text == write(llm, PROMPTS[0], params(grammar, seed=seed)).text


def test_greedy_decoding_takes_the_likeliest_allowed_tokens(llm):
    """Greedy decoding under a mask: each token is the likeliest allowed one."""
    grammar = structured.choice(["dog", "cat", "zebra"], llm.tokenizer)
    made = write(llm, "The little", params(grammar, temperature=0.0, logprobs=20))
    assert made.text in ("dog", "cat", "zebra")
    others = [t for t in ("dog", "cat", "zebra") if t[0] != made.text[0]]
    first = made.logprobs[0]
    for other in others:
        token_id = llm.tokenizer.encode(other)[0]
        if token_id in first.top:
            assert first.top[token_id] <= first.logprob


def test_logprobs_under_a_grammar_are_the_models_own(llm):
    made = write(llm, "The dog", params(structured.regex("[xyz]{3}", llm.tokenizer), seed=1, logprobs=0))
    assert len(made.logprobs) == len(made.token_ids)
    assert all(each.logprob < -1 for each in made.logprobs[:1])  # unlikely according to the model


def test_eos_waits_for_min_tokens_under_a_grammar(llm):
    grammar = structured.regex("[ab]*", llm.tokenizer)
    made = write(llm, "x", params(grammar, seed=1, min_tokens=5, max_new_tokens=8))
    assert len(made.token_ids) >= 5
    assert re.fullmatch("[ab]*", made.text)
    made = write(llm, "x", params(structured.choice(["ab"], llm.tokenizer), ignore_eos=True))
    assert (made.text, made.finish_reason) == ("ab", "stop")


def test_a_text_that_outgrows_its_grammar_does_not_affect_others(llm):
    """The engine ends it with a one-sentence reason; requested on its own, it raises an error."""
    many = structured.grammar('start: ((("a"{1,100}){1,100}){1,100}){1,100}', llm.tokenizer)
    with pytest.raises(UserError, match="too complex after"):
        write(llm, "x", params(many, seed=1, min_tokens=190, max_new_tokens=200))
    made = write(llm, "x", params(structured.choice(["ab"], llm.tokenizer)))
    assert made.text == "ab"
