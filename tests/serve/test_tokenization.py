"""/tokenize, /detokenize and /tokenizer_info over a real server."""

from __future__ import annotations

import pytest


def test_tokenizing_round_trips(server, tiny_llm):
    text = "Once upon a time, é☃ 𝄞!"
    status, body, _ = server.call("/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})
    assert (status, body["tokens"]) == (200, tiny_llm.tokenizer.encode(text))
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert server.call("/detokenize", {"tokens": body["tokens"]})[1] == {"prompt": text}


def test_a_chat_is_tokenized_with_the_template(server, tiny_llm):
    messages = [{"role": "user", "content": "Hi"}]
    body = server.call("/tokenize", {"messages": messages})[1]
    assert body["tokens"] == tiny_llm.tokenizer.encode_chat(messages)
    body = server.call("/tokenize", {"messages": messages, "add_generation_prompt": False})[1]
    assert body["tokens"] == tiny_llm.tokenizer.encode_chat(messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**80]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {}),
    ],
)
def test_mistakes_are_reported(server, path, body):
    status, answer, _ = server.call(path, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_empty_inputs_give_empty_outputs(server):
    assert server.call("/tokenize", {"prompt": ""})[1]["tokens"] == []
    assert server.call("/detokenize", {"tokens": []})[1]["prompt"] == ""


def test_special_tokens_and_tokenizer_info_are_reported(server, tiny_llm):
    info = server.call("/tokenizer_info")[1]
    (eos,) = server.call("/tokenize", {"prompt": info["eos_token"]})[1]["tokens"]
    assert eos == tiny_llm.tokenizer.eos_ids[0]
    assert info["model_max_length"] == 512
    assert "assistant" in info["chat_template"]
