"""Tools: how requests describe them, what the model is told, and calls over HTTP through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from olmoe.serve.errors import ApiError
from olmoe.serve.protocol import ChatRequest
from olmoe.serve.tool_text import written_call
from olmoe.serve.tools import plan, writes_tools
from olmoe.tokenizer import Tokenizer

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 6}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
SCHEMAS = {"get_weather": CITY, "time": {"type": "object", "properties": {}, "additionalProperties": False}}
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]
HISTORY = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Ø"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "warm"}]},
    {"role": "assistant", "content": "It is warm."},
    {"role": "user", "content": "Thanks"},
]
NATIVE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function.arguments.city }}</tool_call>{% endfor %}\n"
    "{% endfor %}"
)


def chat(messages=ASK, **fields) -> ChatRequest:
    return ChatRequest.model_validate({"messages": messages, **fields})


@pytest.fixture(scope="module")
def native(tokenizer_file) -> Tokenizer:
    """A tokenizer whose chat template renders tools itself."""
    return Tokenizer.from_file(tokenizer_file, eos_ids=(3,), chat_template=NATIVE)


# ---- what the model is told ----


def test_a_system_prompt_describes_tools_if_the_template_does_not(tokenizer):
    made = plan(chat(tools=[WEATHER, TIME]), tokenizer)
    assert made.template_tools is None
    system, user = made.messages
    assert (system["role"], user) == ("system", ASK[0])
    assert [json.loads(line) for line in system["content"].splitlines() if line.startswith('{"type"')] == [
        WEATHER,
        TIME,
    ]
    text = tokenizer.render_chat(made.messages)
    assert text.index('"get_weather"') < text.index("What is the weather") < text.rindex("<|assistant|>")


def test_the_chats_system_prompt_comes_first(tokenizer):
    made = plan(chat([{"role": "developer", "content": "Be brief."}, *ASK], tools=[WEATHER]), tokenizer)
    assert [message["role"] for message in made.messages] == ["system", "user"]
    assert made.messages[0]["content"].startswith("Be brief.\n\nYou can call functions.")


def test_calls_and_results_become_text(tokenizer, caplog):
    made = plan(chat(HISTORY), tokenizer)
    assert made.constraint is None
    assert made.reader(0) is None
    calls = written_call("time", "{}") + "\n" + written_call("get_weather", '{"city": "Ø"}')
    results = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
    assert [(m["role"], m["content"]) for m in made.messages] == [
        ("user", ASK[0]["content"]),
        ("assistant", calls),
        ("user", results),
        ("assistant", "It is warm."),
        ("user", "Thanks"),
    ]
    text = tokenizer.render_chat(made.messages)
    assert calls in text
    assert results in text
    assert "leaves out" not in caplog.text


def test_text_before_calls_is_kept(tokenizer):
    messages = [*ASK, {"role": "assistant", "content": "Let me see.", "tool_calls": HISTORY[1]["tool_calls"][:1]}]
    assert plan(chat(messages), tokenizer).messages[1]["content"] == "Let me see.\n" + written_call("time", "{}")


def test_a_template_that_renders_tools_gets_them(native):
    assert writes_tools(NATIVE)
    made = plan(chat(HISTORY, tools=[WEATHER]), native)
    assert made.template_tools == [WEATHER]
    text = native.render_chat(made.messages, tools=made.template_tools)
    assert text.startswith(json.dumps(WEATHER) + "\nuser: What")
    assert "<tool_call>\nØ</tool_call>" in text  # arguments are objects there
    assert "tool: noon" in text
    assert "You can call functions" not in text


@pytest.mark.parametrize("arguments", ["", "no JSON", "[1]", "[" * 5000])
def test_odd_arguments_in_the_history_are_rendered_unchanged(tokenizer, arguments):
    call = {"id": "x", "type": "function", "function": {"name": "time", "arguments": arguments}}
    made = plan(chat([*ASK, {"role": "assistant", "tool_calls": [call]}]), tokenizer)
    assert '{"name": "time", "arguments": ' in made.messages[1]["content"]


def test_no_tools_are_described_if_none_may_be_called(tokenizer):
    made = plan(chat(tools=[WEATHER], tool_choice="none"), tokenizer)
    assert made.constraint is None
    assert made.messages == ASK


# ---- which calls are allowed ----


@pytest.mark.parametrize(
    ("fields", "mode", "names", "parallel"),
    [
        ({}, "auto", ["get_weather", "time"], True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "auto", ["get_weather", "time"], False),
        ({"tool_choice": "required"}, "required", ["get_weather", "time"], True),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "named", ["time"], False),
        ({"tool_choice": {"type": "function", "name": "time"}}, "named", ["time"], False),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "time"}}],
                    },
                }
            },
            "required",
            ["time"],
            True,
        ),
    ],
)
def test_tool_choice_is_translated(tokenizer, fields, mode, names, parallel):
    calls = plan(chat(tools=[WEATHER, TIME], **fields), tokenizer).constraint
    assert (calls.mode, [tool.name for tool in calls.tools], calls.parallel) == (mode, names, parallel)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [TIME, {"type": "function"}]}, "tools[1].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools[1].function.name"),
        ({"tools": [{"function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "a", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [{"function": {"name": "a", "description": 1}}]}, "tools[0].function.description"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        ({"tools": [TIME], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "x"}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.function.name"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "mode": "no"}}, "tool_choice.allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": {}}]}, None),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": {"a": 1}}]}, "messages[1].tool_calls"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0].function"),
        (
            {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 3}}]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "x"}]}, "messages[1].content"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_with_their_place(server, fields, param):
    status, answer, _ = server.call("/v1/chat/completions", {"messages": ASK, "max_tokens": 2, **fields})
    if param is None:
        assert status in (200, 400)
        return
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, param, "invalid_request_error")


@pytest.mark.parametrize(
    ("parameters", "strict", "words"),
    [
        ({"properties": {"a": {"type": "foo"}}}, False, "Invalid type: foo"),
        ({"properties": {"a": {"pattern": "(a{1000}){1000}", "type": "string"}}}, False, "cannot be used"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, True, '"not"'),
    ],
)
def test_an_unusable_schema_names_its_tool(server, parameters, strict, words):
    broken = {"type": "function", "function": {"name": "b", "parameters": parameters, "strict": strict}}
    status, answer, _ = server.call("/v1/chat/completions", {"messages": ASK, "tools": [TIME, broken], "max_tokens": 4})
    assert (status, answer["error"]["param"]) == (400, "tools[1].function.parameters")
    assert words in answer["error"]["message"]
    assert "tools[1].function.parameters" in answer["error"]["message"]


def test_unenforceable_keywords_are_accepted_in_non_strict_schemas(server):
    loose = {"function": {"name": "b", "parameters": {"properties": {"a": {"type": "string", "format": "iri"}}}}}
    body = {"messages": ASK, "tools": [loose], "tool_choice": "auto", "max_tokens": 4}
    assert server.call("/v1/chat/completions", body)[0] == 200


def test_duplicate_tools_are_refused_with_400(tokenizer):
    with pytest.raises(ApiError) as caught:
        plan(chat(tools=[TIME, TIME]), tokenizer)
    assert caught.value.status == 400


# ---- through OpenAI's client ----


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client, **fields):
    values = {"model": "olmoe-tiny", "messages": ASK, "tools": [WEATHER, TIME], "max_tokens": 400, **fields}
    return client.chat.completions.create(**values)


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("seed", range(5))
def test_required_calls_follow_their_schema(client, seed):
    (choice,) = ask(client, tool_choice="required", seed=seed, parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("seed", range(3))
def test_a_named_function_is_called(client, seed):
    named = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = ask(client, tool_choice=named, seed=seed).choices
    assert choice.finish_reason == "stop"  # as OpenAI answers if the function was named
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("seed", range(4))
def test_several_calls_can_be_made(client, seed):
    answer = ask(client, tool_choice="required", seed=seed, n=3, max_tokens=1500)
    for choice in answer.choices:
        calls = choice.message.tool_calls
        assert len({call.id for call in calls}) == len(calls)
        if choice.finish_reason == "tool_calls":
            for call in calls:
                check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("seed", range(3))
def test_stream_parts_add_up_to_the_whole_answer(client, seed):
    """OpenAI's order: the role; id, type and name once for each call; arguments; finally the reason alone."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    whole = ask(client, tool_choice=named, seed=seed).choices[0]
    chunks = list(ask(client, tool_choice=named, seed=seed, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens > 10
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    first, *others = calls
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        0,
        "function",
        "get_weather",
        "",
    )
    assert first.id.startswith("call_")
    assert others
    assert all((call.index, call.id, call.type, call.function.name) == (0, None, None, None) for call in others)
    assert "".join(call.function.arguments for call in calls) == whole.message.tool_calls[0].function.arguments
    assert not any(delta.content for delta in deltas)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_parallel_calls_are_streamed(client):
    for seed in range(20):
        chunks = list(ask(client, tool_choice="required", seed=seed, stream=True, max_tokens=2000, tools=[TIME]))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        if len([call for call in calls if call.id]) < 2 or chunks[-1].choices[0].finish_reason != "tool_calls":
            continue
        assert [call.index for call in calls if call.id] == list(range(len([call for call in calls if call.id])))
        assert [call.index for call in calls] == sorted(call.index for call in calls)
        for index in {call.index for call in calls}:
            assert json.loads("".join(call.function.arguments for call in calls if call.index == index)) == {}
        return
    pytest.fail("no answer had two calls")


def test_auto_without_a_call_is_text(client):
    """The model has never seen tools, so without constraints it writes text."""
    (choice,) = ask(client, temperature=0, max_tokens=20).choices
    assert choice.message.tool_calls is None
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    streamed = ask(client, temperature=0, max_tokens=20, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == choice.message.content


@pytest.fixture
def wants_to_call(server, monkeypatch):
    """The model writes some text and a call marker, like one trained on tools; then it chooses freely."""
    begun = server.llm.tokenizer.encode("Let me see. <tool_call>")
    choose = server.engine._sampler.choose_rows

    def choose_rows(logits, requests, masks=None):
        choices = choose(logits, requests, masks)
        for i, request in enumerate(requests):
            if len(request.token_ids) < len(begun):
                choices[i] = choices[i]._replace(token_id=begun[len(request.token_ids)])
                assert masks[i][choices[i].token_id // 32] >> (choices[i].token_id % 32) & 1
        return choices

    monkeypatch.setattr(server.engine._sampler, "choose_rows", choose_rows)


@pytest.mark.parametrize("stream", [False, True])
def test_auto_completes_a_call_that_has_started(client, wants_to_call, stream):
    for seed in range(5):
        answer = ask(client, seed=seed, max_tokens=300, stream=stream, parallel_tool_calls=False)
        if stream:
            deltas = [chunk.choices[0] for chunk in answer]
            text = "".join(each.delta.content or "" for each in deltas)
            calls = [call for each in deltas for call in each.delta.tool_calls or ()]
            found = [(calls[0].function.name, "".join(call.function.arguments for call in calls))]
            reason = deltas[-1].finish_reason
        else:
            (choice,) = answer.choices
            text, reason = choice.message.content, choice.finish_reason
            found = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert (text, reason) == ("Let me see.", "tool_calls")
        for name, arguments in found:
            check(name, arguments)


def test_an_answer_cut_short_says_so(client):
    (choice,) = ask(client, tool_choice="required", max_tokens=30, seed=1, tools=[WEATHER]).choices
    assert choice.finish_reason == "length"
    assert "<tool_call>" not in (choice.message.content or "")


def test_a_call_and_its_result_make_a_whole_round(client):
    answer = ask(client, tool_choice="required", seed=1, parallel_tool_calls=False).choices[0].message
    messages = [*ASK, answer, {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "sunny"}]
    (choice,) = ask(client, messages=messages, max_tokens=8).choices
    assert choice.finish_reason in ("stop", "length")
    assert (
        client.chat.completions.create(model="olmoe-tiny", messages=messages, max_tokens=4).choices[0].message.content
    )


def test_tools_work_with_a_response_format(client):
    """A call or JSON; if a call is required, the format does not apply."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(6):
        (choice,) = ask(client, seed=seed, response_format=form).choices
        if choice.message.tool_calls:
            assert choice.message.content is None
        else:
            jsonschema.validate(json.loads(choice.message.content), schema)
    (choice,) = ask(client, response_format=form, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.message.tool_calls


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Rome"]
    days: Annotated[int, Field(ge=1, le=14)] | None


def test_pydantic_tools_are_supported(client):
    tool = openai.pydantic_function_tool(GetWeather)
    for seed in range(4):
        answer = client.chat.completions.parse(
            model="olmoe-tiny", messages=ASK, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=seed
        )
        assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, GetWeather)


def test_token_ids_logprobs_and_routing_come_with_calls(server):
    body = {"messages": ASK, "tools": [TIME], "tool_choice": "required", "parallel_tool_calls": False,
            "seed": 1, "return_token_ids": True, "logprobs": True, "routing": True}  # fmt: skip
    status, answer, _ = server.call("/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert status == 200
    tokens = answer["usage"]["completion_tokens"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == choice["routing"]["tokens"] == tokens
    streamed = server.events("/v1/chat/completions", body)
    ids = [i for event in streamed[:-1] for each in event["choices"] for i in each.get("token_ids", ())]
    assert len(ids) == tokens
