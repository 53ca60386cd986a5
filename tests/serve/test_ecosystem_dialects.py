"""Packages that use /v1/responses and /v1/messages themselves: LangChain and litellm."""

from __future__ import annotations

import pytest

MODEL = "olmoe-tiny"
SAID = "def add(a, b):"


def answer_of(server, messages, **fields):
    """What /v1/chat/completions answers."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    return server.call("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]


def test_langchain_over_responses(server):
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage

    model = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=12, max_retries=0,
        use_responses_api=True, use_previous_response_id=True,
    )  # fmt: skip
    said = [HumanMessage(SAID)]
    first = model.invoke(said)
    assert first.text == answer_of(server, [{"role": "user", "content": SAID}])
    assert first.usage_metadata["output_tokens"] == 12
    assert "".join(chunk.text for chunk in model.stream(said)) == first.text
    second = model.invoke([*said, first, HumanMessage("Again")])
    history = [
        {"role": "user", "content": SAID},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Again"},
    ]
    assert second.text == answer_of(server, history)


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it accesses the network on import
    return pytest.importorskip("litellm")


def test_litellm_over_messages(server, litellm):
    given = {
        "model": f"anthropic/{MODEL}",
        "api_base": server.url,
        "api_key": "none",
        "messages": [{"role": "system", "content": "Write Python."}, {"role": "user", "content": SAID}],
        "temperature": 0,
        "max_tokens": 12,
    }
    whole = litellm.completion(**given)
    assert whole.choices[0].message.content == answer_of(server, given["messages"])
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    chunks = list(litellm.completion(**given, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_litellm_over_responses(server, litellm):
    given = {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none", "input": SAID}
    answer = litellm.responses(**given, temperature=0, max_output_tokens=16)  # its minimum
    assert answer.output[0].content[0].text == answer_of(server, [{"role": "user", "content": SAID}], max_tokens=16)
