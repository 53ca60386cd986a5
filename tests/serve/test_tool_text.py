from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from olmoe.engine import structured
from olmoe.errors import UserError
from olmoe.serve.chat_run import Finished, TextDelta, ToolCallDelta
from olmoe.serve.tool_text import CallReader, Calls, Tool, instructions, written_call

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, parameters: dict = CITY, strict: bool = False) -> Tool:
    return Tool(name, parameters, strict, {"name": name, "parameters": parameters}, "tools[0].function")


def read(parts: list[str], reason: str = "stop") -> tuple[str, list[tuple[str, str]], str, list]:
    """(content, calls as name and arguments, reason, events) of a text that arrives in parts."""
    reader, events = CallReader(3), []
    for part in parts:
        events += reader.read(TextDelta(3, part))
    events += reader.finish(Finished(3, reason))
    assert all(event.index == 3 for event in events)
    *events, end = events
    assert isinstance(end, Finished)
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, ToolCallDelta):
            assert (event.id is None) is (event.name is None)
            if event.name is not None:
                assert event.id.startswith("call_")
                assert event.call == len(calls)
                calls.append([event.name, ""])
            assert event.call == len(calls) - 1
            calls[-1][1] += event.arguments
    ids = [event.id for event in events if isinstance(event, ToolCallDelta) and event.id]
    assert len(set(ids)) == len(calls)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [(name, arguments) for name, arguments in calls], end.reason, events


def split(text: str, how: int) -> list[str]:
    return [text[i : i + how] for i in range(0, len(text), how)]


A = written_call("a", '{"city": "Oslo"}')
B = written_call("b.c/d", '{"x": [{"y": "}<tool_call>\\\\\\" é"}], "z": {}}')
ARGUMENTS_B = '{"x": [{"y": "}<tool_call>\\\\\\" é"}], "z": {}}'


@pytest.mark.parametrize("how", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls", "reason"),
    [
        ("plain text", "plain text", [], "stop"),
        ("", "", [], "stop"),
        (" a < b <tool_ c <tool_call d\n\n", " a < b <tool_ c <tool_call d\n\n", [], "stop"),
        (A, "", [("a", '{"city": "Oslo"}')], "tool_calls"),
        ("\n\n" + A + "\n", "", [("a", '{"city": "Oslo"}')], "tool_calls"),
        ("Let me see. \n" + A, "Let me see.", [("a", '{"city": "Oslo"}')], "tool_calls"),
        ("<" + A, "<", [("a", '{"city": "Oslo"}')], "tool_calls"),
        (A + "\n" + B, "", [("a", '{"city": "Oslo"}'), ("b.c/d", ARGUMENTS_B)], "tool_calls"),
        (A + B + A, "", [("a", '{"city": "Oslo"}'), ("b.c/d", ARGUMENTS_B), ("a", '{"city": "Oslo"}')], "tool_calls"),
        (written_call("é\"\n", "{}"), "", [("é\"\n", "{}")], "tool_calls"),
        ('<tool_call>{"name":"a","arguments":{}}</tool_call>', "", [("a", "{}")], "tool_calls"),
        # cut off: what is certain is reported, nothing leaks, and the call is not finished
        (A[:8], A[:8], [], "stop"),
        (A[:15], "", [], "stop"),
        (A[: A.index("Oslo") + 2], "", [("a", '{"city": "Os')], "stop"),
        (A[:-3], "", [("a", '{"city": "Oslo"}')], "stop"),
        (A + "\n" + B[: B.index('y":')], "", [("a", '{"city": "Oslo"}'), ("b.c/d", '{"x": [{"')], "stop"),
    ],
)  # fmt: skip
def test_tool_text_is_parsed_however_it_is_split(text, content, calls, reason, how):
    assert read(split(text, how))[:3] == (content, calls, reason)


@pytest.mark.parametrize("count", range(1, 11))
def test_a_partial_call_marker_is_shown_only_where_it_may_be_text(count):
    mark = "<tool_call>"[:count]
    for reader, before, shown in (
        (CallReader(0), "", mark),
        (CallReader(0), "a ", "a " + mark),
        (CallReader(0), A + "\n", ""),
        (CallReader(0, forced=True), "", ""),
    ):
        events = [*reader.read(TextDelta(0, before + mark)), *reader.finish(Finished(0, "length"))]
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == shown


@pytest.mark.parametrize("reason", ["length", "cancelled", "error"])
def test_only_a_stop_reason_becomes_tool_calls(reason):
    assert read([A], reason)[2] == reason


def test_details_of_the_last_delta_are_kept():
    reader = CallReader(0)
    reader.read(TextDelta(0, A))
    assert reader.finish(Finished(0, "stop", None, "</s>")) == [Finished(0, "tool_calls", None, "</s>")]
    assert CallReader(1).finish(Finished(1, "error", "It broke.")) == [Finished(1, "error", "It broke.")]


def test_a_stream_follows_openais_table():
    """OpenAI's rules: id and name once, then arguments; each call has its index; text comes before."""
    parts = [
        "Hm",
        "m. ",
        '<tool_call>\n{"name": "a',
        '", "arguments": ',
        '{"city"',
        ': "Oslo"}',
        "}\n</tool_call>\n<tool",
    ]
    told = [
        event.text if isinstance(event, TextDelta) else (event.call, event.id is not None, event.name, event.arguments)
        for event in read([*parts, '_call>\n{"name": "b", "arguments": {}}\n</tool_call>'])[3]
    ]
    assert told == [
        "Hm",
        "m.",
        (0, True, "a", ""),
        (0, False, None, '{"city"'),
        (0, False, None, ': "Oslo"}'),
        (1, True, "b", ""),
        (1, False, None, "{}"),
    ]


def test_token_reports_pass_through_whatever_the_text():
    reader = CallReader(0)
    ids = []
    for i, part in enumerate(split("Hm. " + A, 5)):
        for event in reader.read(TextDelta(0, part, token_ids=[i])):
            if isinstance(event, TextDelta):
                ids += event.token_ids
    assert ids == list(range(len(split("Hm. " + A, 5))))


_CALLS = st.tuples(st.text(max_size=5), st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3))


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet='<tool_call>\n ab"{}', max_size=60), calls=st.lists(_CALLS, max_size=3), how=st.integers(1, 9)
)
def test_any_text_and_calls_round_trip(text, calls, how):
    written = text + "\n".join(written_call(name, json.dumps(arguments)) for name, arguments in calls)
    # The text neither holds a call marker nor ends with the start of one.
    assume((written + "<tool_call>").index("<tool_call>") >= len(text))
    content, found, reason, _ = read(split(written, how))
    assert content == (text.rstrip() if calls else text)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert reason == ("tool_calls" if calls else "stop")


# ---- the grammar ----


def write(grammar, tokenizer, seed: int, begin: str = "") -> tuple[str, bool]:
    """A random text that follows a grammar, and whether it is finished."""
    random, state, ids = np.random.default_rng(seed), grammar.start(), list[int]()
    mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    closing = [i for i in range(tokenizer.vocab_size) if set(tokenizer.token_bytes(i)) & set(b'"]},')]
    planned = tokenizer.encode(begin)
    while not state.finished and len(ids) < 600:
        state.fill(mask)
        choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        ends = [*np.intersect1d(choices, closing), *(i for i in tokenizer.eos_ids if i in choices)]
        token_id = int(random.choice(ends if ends and random.random() < 0.5 else choices))
        if planned:
            token_id = planned.pop(0)
            assert token_id in choices
        state.accept(token_id)
        ids.append(token_id)
    return tokenizer.decode(ids), state.finished


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["required", "named"])
def test_required_calls_are_valid_from_the_first_token(tokenizer, mode, seed):
    tools = (tool("weather"), tool('odd"name\\é', NONE)) if mode == "required" else (tool("weather"),)
    text, ended = write(structured.assembled(Calls(tools, mode).lark(), tokenizer), tokenizer, seed)
    assert ended
    content, calls, reason, _ = read([text])
    assert (content, reason) == ("", "tool_calls")
    assert 1 <= len(calls) <= (16 if mode == "required" else 1)
    for name, arguments in calls:
        parameters = {each.name: each.parameters for each in tools}[name]
        jsonschema.validate(json.loads(arguments), parameters)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("begin", ["<tool_call>", "Let me see: <<tool_call>", "日本 <tool_<tool_call>"])
def test_a_call_started_by_the_model_becomes_valid(tokenizer, begin, seed):
    grammar = structured.assembled(Calls((tool("weather"), tool("none", NONE)), "auto").lark(), tokenizer)
    text, ended = write(grammar, tokenizer, seed, begin)
    assert ended
    content, calls, reason, _ = read(split(text, 4))
    assert content == begin.removesuffix("<tool_call>")
    assert reason == "tool_calls"
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), CITY if name == "weather" else NONE)


def test_without_a_call_any_text_is_allowed(tokenizer):
    grammar = structured.assembled(Calls((tool("weather"),), "auto").lark(), tokenizer)
    text = 'a <tool_call is not a tool_call>.\n\n{"name": 3}'
    state = grammar.start()
    mask = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    for token_id in [*tokenizer.encode(text), tokenizer.eos_ids[0]]:
        state.fill(mask)
        assert mask[token_id // 32] >> (token_id % 32) & 1
        state.accept(token_id)
    assert state.finished


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_may_be_json_or_a_call(tokenizer, seed):
    calls = Calls((tool("weather"),), "auto")
    empty = '%json {"type": "object", "properties": {}, "additionalProperties": false}'
    grammar = structured.assembled(calls.lark(empty), tokenizer)
    text, ended = write(grammar, tokenizer, seed)
    assert ended
    content, found, _, _ = read([text])
    assert (json.loads(content) == {}) if not found else content == ""


def test_parallel_calls_can_be_disabled(tokenizer):
    grammar = structured.assembled(Calls((tool("none", NONE),), "required", parallel=False).lark(), tokenizer)
    state = grammar.start()
    for token_id in tokenizer.encode(written_call("none", "{}")):
        state.accept(token_id)
    assert state.finished


def test_an_invalid_schema_names_its_tool():
    deep: dict = {}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(UserError, match=r"tools\[0\].function.parameters is nested more than 60"):
        Calls((tool("a", deep),), "required").lark()


def test_the_prompt_describes_the_format_that_is_parsed():
    text = instructions([tool("weather")])
    assert json.dumps({"type": "function", "function": tool("weather").given}) in text
    example = text[text.index("<tool_call>") :]
    assert read([example])[1] == [("the function's name", '{"an argument": "its value"}')]


def test_fixture_has_every_byte(tokenizer):
    assert {bytes([b]) for b in range(256)} <= {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
