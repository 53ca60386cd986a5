"""The openai package against a real server: sync, async, streams, errors, retries."""

from __future__ import annotations

import asyncio

import pytest

from olmoe import SamplingParams
from olmoe.serve.state import ServeSettings

openai = pytest.importorskip("openai")

MESSAGES = [{"role": "user", "content": "Tell me a story about a dog."}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("olmoe-tiny", 512)
    assert client.models.retrieve("olmoe-tiny").id == "olmoe-tiny"


def test_a_chat_equals_the_librarys(client, tiny_llm):
    (expected,) = tiny_llm.chat(MESSAGES, SamplingParams(max_new_tokens=20))
    answer = client.chat.completions.create(model="olmoe-tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_chat_streams(client):
    asked = {"model": "olmoe-tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 30, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for index, choice in enumerate(whole.choices):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper(client):
    asked = {"model": "olmoe-tiny", "messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    with client.chat.completions.stream(**asked, max_tokens=20) as stream:
        kinds = {event.type for event in stream}
    # It treats reaching the limit as an error, so this one ends at a stop string.
    text = client.chat.completions.create(**asked, max_tokens=20).choices[0].message.content
    with client.chat.completions.stream(**asked, max_tokens=20, stop=text[-2:]) as stream:
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == text[: text.index(text[-2:])]


def test_completions(client, tiny_llm):
    (expected,) = tiny_llm.generate("Once upon a time", SamplingParams(max_new_tokens=16, logprobs=2))
    asked = {"model": "olmoe-tiny", "prompt": "Once upon a time", "temperature": 0}
    answer = client.completions.create(**asked, logprobs=2, echo=True)
    (choice,) = answer.choices
    assert choice.text == "Once upon a time" + expected.text
    assert choice.logprobs.token_logprobs[4:] == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-6)
    assert choice.logprobs.token_logprobs[0] is None
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text


def test_extension_fields_are_accepted(client):
    answer = client.chat.completions.create(
        model="olmoe-tiny",
        messages=MESSAGES,
        max_tokens=5,
        extra_body={"routing": True, "router_policy": {"k": 4}, "ignore_eos": True, "top_k": 5},
    )
    assert answer.choices[0].routing["tokens"] == 5
    assert answer.choices[0].routing["k"] == 8


def test_mistakes_raise_errors_that_name_the_field(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="olmoe-tiny", messages=MESSAGES, temperature=-1)
    assert (caught.value.param, caught.value.status_code) == ("temperature", 400)
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        list(client.completions.create(model="olmoe-tiny", prompt="word " * 600, stream=True))
    assert caught.value.param == "prompt"


def test_a_wrong_key_raises(run_server):
    running = run_server(ServeSettings(port=0, api_keys=("right",)))
    asked = {"model": "olmoe-tiny", "messages": MESSAGES, "max_tokens": 2}
    wrong = openai.OpenAI(base_url=running.url + "/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        wrong.chat.completions.create(**asked)
    right = openai.OpenAI(base_url=running.url + "/v1", api_key="right", max_retries=0)
    assert right.chat.completions.create(**asked).choices


def test_an_engine_that_breaks_in_a_stream_raises(run_server, monkeypatch):
    running = run_server()
    steps, step = [], running.engine.step

    def failing():
        steps.append(1)
        if len(steps) > 5:
            raise RuntimeError("the runner broke")
        return step()

    monkeypatch.setattr(running.engine, "step", failing)
    client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
    stream = client.chat.completions.create(model="olmoe-tiny", messages=MESSAGES, max_tokens=50, stream=True,
                                            extra_body={"ignore_eos": True})  # fmt: skip
    with pytest.raises(openai.APIError, match="the runner broke"):
        list(stream)


def test_abandoning_a_stream_frees_everything(client, server):
    asked = {"model": "olmoe-tiny", "messages": MESSAGES, "max_tokens": 450, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
    assert server.idle()


def test_concurrent_async_clients_get_the_same_as_alone(server):
    prompts = [f"Once upon a time there was a {animal}" for animal in "dog cat bird fish girl boy".split()] * 3

    async def one(client, prompt):
        chunks = await client.completions.create(
            model="olmoe-tiny", prompt=prompt, temperature=0.8, seed=7, max_tokens=40, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any") as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    together = asyncio.run(all_of_them())
    assert together[:6] == together[6:12] == together[12:]
    for prompt, text in list(zip(prompts, together, strict=True))[:6]:
        body = {"prompt": prompt, "temperature": 0.8, "seed": 7, "max_tokens": 40}
        assert server.call("/v1/completions", body)[1]["choices"][0]["text"] == text


def test_a_full_queue_is_retried(run_server):
    running = run_server(ServeSettings(port=0, max_queued_requests=1), max_rows=1)
    asked = {"model": "olmoe-tiny", "prompt": "Once", "max_tokens": 200, "extra_body": {"ignore_eos": True}}

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="any", max_retries=9) as client:
            return await asyncio.gather(*(client.completions.create(**asked) for _ in range(4)))

    answers = asyncio.run(all_of_them())
    assert [answer.usage.completion_tokens for answer in answers] == [200] * 4
