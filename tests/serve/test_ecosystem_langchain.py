"""LangChain's ChatOpenAI against a real server."""

from __future__ import annotations

import asyncio

import pytest

from olmoe import SamplingParams

pytest.importorskip("langchain_openai", reason="the dev extra is not installed")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def chat(server):
    return ChatOpenAI(base_url=server.url + "/v1", api_key="any", model="olmoe-tiny", temperature=0, max_tokens=20)


def test_messages(chat, tiny_llm):
    (expected,) = tiny_llm.chat(MESSAGES, SamplingParams(max_new_tokens=20))
    answer = chat.invoke([SystemMessage("Be kind."), HumanMessage("Tell me a story.")])
    assert isinstance(answer, AIMessage)
    assert answer.content == expected.text
    assert answer.usage_metadata["output_tokens"] == len(expected.token_ids)
    assert answer.response_metadata["finish_reason"] == "length"


def test_streams(chat, server):
    whole = chat.invoke("Hello").content
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole
    counted = ChatOpenAI(base_url=server.url + "/v1", api_key="any", model="olmoe-tiny", temperature=0, max_tokens=20,
                         stream_usage=True)  # fmt: skip
    chunks = list(counted.stream("Hello"))
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 20


def test_many_at_once(chat):
    texts = [f"Tell me about a {animal}." for animal in "dog cat bird".split()]
    alone = [chat.invoke(text).content for text in texts]
    assert [answer.content for answer in chat.batch(texts)] == alone
    assert [answer.content for answer in asyncio.run(chat.abatch(texts))] == alone


def test_logprobs_and_extra_fields(chat):
    answer = chat.bind(logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True, "top_k": 3}).invoke("Hello")
    assert len(answer.response_metadata["logprobs"]["content"]) == 20


def test_completions(server, tiny_llm):
    (expected,) = tiny_llm.generate("Once upon a time", SamplingParams(max_new_tokens=12))
    model = OpenAI(base_url=server.url + "/v1", api_key="any", model="olmoe-tiny", temperature=0, max_tokens=12)
    assert model.invoke("Once upon a time") == expected.text
    assert "".join(model.stream("Once upon a time")) == expected.text
