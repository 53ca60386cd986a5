"""LiteLLM against a real server, as a generic OpenAI-compatible one and as vLLM."""

from __future__ import annotations

import os

import pytest

from olmoe import SamplingParams

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it fetches prices from the network on import
litellm = pytest.importorskip("litellm", reason="the dev extra is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # LiteLLM's own, dozens of them

MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def asked(server):
    return {"messages": MESSAGES, "temperature": 0, "max_tokens": 16, "api_base": server.url + "/v1"}


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_chat(asked, provider, tiny_llm):
    (expected,) = tiny_llm.chat(MESSAGES, SamplingParams(max_new_tokens=16))
    key = {} if provider == "hosted_vllm" else {"api_key": "any"}  # the one sends fake-api-key by itself
    answer = litellm.completion(model=f"{provider}/olmoe-tiny", **asked, **key)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == 16
    chunks = list(litellm.completion(model=f"{provider}/olmoe-tiny", **asked, **key, stream=True,
                                     stream_options={"include_usage": True}))  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] is not None


def test_text_completion(server, tiny_llm):
    (expected,) = tiny_llm.generate("Once upon a time", SamplingParams(max_new_tokens=16))
    answer = litellm.text_completion(
        model="text-completion-openai/olmoe-tiny", prompt="Once upon a time", temperature=0, max_tokens=16,
        api_base=server.url + "/v1", api_key="any",
    )  # fmt: skip
    assert answer.choices[0].text == expected.text


def test_mistakes(asked):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(model="hosted_vllm/olmoe-tiny", **{**asked, "temperature": -1})
