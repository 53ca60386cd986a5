"""Conversations: what is sent, what is kept, and what happens when the context is full."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from conftest import make_model
from olmoe.engine.conversation import Conversation, checked_messages, dump_messages, expert_use, parse_messages
from olmoe.engine.llm import LLM
from olmoe.engine.request import Routing
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from sentences import refused

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tokenizer) -> LLM:
    return LLM.from_parts(make_model(max_position_embeddings=256), tokenizer)


def said(llm, messages) -> str:
    return llm.generate(llm.tokenizer.encode_chat(messages), PARAMS)[0].text


def test_each_answer_equals_generating_from_the_whole_chat(llm):
    chat = Conversation(llm, PARAMS, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("the dog", "the ball"):
        answer = "".join(chat.ask(question))
        messages.append({"role": "user", "content": question})
        assert answer == said(llm, messages)
        messages.append({"role": "assistant", "content": answer})
    assert chat.messages == messages
    assert chat.last is not None
    assert chat.last.finish_reason == "length"


def test_an_abandoned_answer_is_kept_as_far_as_generated(llm):
    chat = Conversation(llm, PARAMS)
    pieces = chat.ask("the dog")
    first = next(pieces)
    pieces.close()
    assert chat.messages == [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": first}]
    assert chat.last.finish_reason == "cancelled"
    assert "".join(chat.retry()).startswith(first)
    assert len(chat.messages) == 2


def test_an_interrupted_answer_is_kept_too(llm, monkeypatch):
    chat = Conversation(llm, PARAMS)
    stream = LLM.stream

    class Interrupted:
        def __init__(self, inner):
            self.inner, self.completion = inner, None

        def __iter__(self):
            yield next(self.inner)
            raise KeyboardInterrupt

        def close(self):
            self.inner.close()
            self.completion = self.inner.completion

    monkeypatch.setattr(LLM, "stream", lambda self, *a: Interrupted(stream(self, *a)))
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("the dog"))
    assert chat.messages[1]["content"]


def test_undo_retry_and_reset_work(llm):
    chat = Conversation(llm, PARAMS, system="Be brief.")
    "".join(chat.ask("one"))
    before = chat.messages
    "".join(chat.ask("two"))
    assert chat.undo() == "two"
    assert chat.messages == before
    assert "".join(chat.retry()) == before[-1]["content"]
    assert chat.messages == before
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.system = None
    assert chat.messages == []
    for action in (chat.undo, chat.retry):
        assert refused(action) == "Nothing has been asked yet; write a message first."


def test_messages_are_returned_as_copies(llm):
    chat = Conversation(llm, messages=[{"role": "user", "content": "a"}])
    chat.messages[0]["content"] = "b"
    chat.messages.clear()
    assert chat.messages == [{"role": "user", "content": "a"}]


def test_a_full_context_drops_no_messages(llm):
    chat = Conversation(llm, dataclasses.replace(PARAMS, max_new_tokens=1000))
    left = chat.left
    assert left == chat.context_length == 256
    "".join(chat.ask("the dog"))
    assert chat.cut_by_context
    assert chat.left < 10
    before, last = chat.messages, chat.last
    message = refused(lambda: chat.ask("the ball and the dog " * 10))
    assert "context ends at 256, so nothing was sent; start again with /reset" in message
    assert (chat.messages, chat.last) == (before, last)


def test_a_user_limit_is_not_reported_as_a_full_context(llm):
    chat = Conversation(llm, PARAMS)
    "".join(chat.ask("the dog"))
    assert not chat.cut_by_context
    prompt = llm.tokenizer.encode_chat(chat.messages, add_generation_prompt=False)
    assert chat.left == 256 - len(prompt)


def test_an_empty_message_is_refused(llm):
    assert refused(lambda: Conversation(llm).ask(" \n")).startswith("The message is empty")


def test_the_default_template_stops_answers_at_the_next_turn(llm, tokenizer, monkeypatch):
    """A base model would go on writing turns. If the checkpoint has its own template, no stop string is added."""
    seen = []
    stream = LLM.stream
    monkeypatch.setattr(LLM, "stream", lambda self, p, params: seen.append(params.stop) or stream(self, p, params))
    chat = Conversation(llm, dataclasses.replace(PARAMS, stop=["zebra"]))
    assert chat.default_template
    list(chat.ask("x"))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[-1]['content'] }}")
    assert not chat.default_template
    list(chat.ask("x"))
    assert seen == [["zebra", "<|user|>", "<|system|>", "<|assistant|>"], ["zebra"]]


def test_a_user_error_during_an_answer_changes_nothing(llm, monkeypatch):
    chat = Conversation(llm, PARAMS)

    class Failing:
        completion = None

        def __iter__(self):
            raise UserError("The model's logits are not numbers.")
            yield ""

        def close(self):
            pass

    monkeypatch.setattr(LLM, "stream", lambda *_: Failing())
    with pytest.raises(UserError, match="not numbers"):
        list(chat.ask("x"))
    assert chat.messages == []


# ---- experts ----


def test_expert_use_counts_tokens_and_skips_unused_slots():
    routing = [
        Routing(np.array([[0, 2], [1, 2]], np.int16), np.ones((2, 2), np.float32)),
        Routing(np.array([[0, 1], [3, -1]], np.int16), np.ones((2, 2), np.float32)),
    ]
    assert expert_use(routing, 4).tolist() == [[1, 0.5, 0.5, 0], [0, 0.5, 0.5, 0.5]]


def test_expert_use_is_unknown_without_an_answer(llm):
    assert refused(Conversation(llm).expert_use).startswith("There is no answer whose experts are known")


# ---- files ----


def test_messages_round_trip_through_a_file():
    messages = [
        {"role": "system", "content": "Sei kurz, Mädchen."},
        {"role": "user", "content": 'a\n"b"'},
        {"role": "assistant", "content": ""},
    ]
    text = dump_messages(messages)
    assert "Mädchen" in text
    assert json.loads(text) == messages
    assert parse_messages(text, "x.json") == messages
    assert parse_messages(json.dumps({"model": "m", "messages": messages}), "x.json") == messages


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "x.json is not JSON ("),
        ("3", "A chat is a list of messages with role and content, not int (x.json)."),
        ('["a"]', "Message 0 must be an object with role and content, not 'a' (x.json)."),
        ('[{"role": "tool", "content": "a"}]', "Message 0 must have a role of system, user, assistant, not 'tool'"),
        ('[{"role": "user"}]', "Message 0 must have a text as content, not None (x.json)."),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "Message 0 must have a text as content, not [{"),
        (
            '[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]',
            "Message 1 is a system prompt, which can only be the first message; move it (x.json).",
        ),
    ],
)
def test_invalid_chats_are_refused(text, sentence):
    assert refused(lambda: parse_messages(text, "x.json")).startswith(sentence)


def test_a_conversation_computes_only_new_tokens(tokenizer):
    """With a prefix cache, even after an abandoned answer, since its engine stays usable."""
    llm = LLM.from_parts(make_model(max_position_embeddings=1024), tokenizer, prefix_cache=True)
    chat = Conversation(llm, dataclasses.replace(PARAMS, routing=True))
    chat.system = "the dog and the ball " * 30
    pieces = chat.ask("the dog")
    next(pieces)
    pieces.close()
    streams = []
    stream = llm.stream
    llm.stream = lambda *arguments: streams.append(stream(*arguments)) or streams[-1]
    "".join(chat.retry())
    (only,) = streams
    assert only._request.cached_tokens >= 64
    assert only._request.cached_tokens % 64 == 0
    use = chat.expert_use()
    assert use.shape == (2, 8)
    assert np.allclose(use.sum(axis=1), 3)


def test_answers_do_not_depend_on_the_prefix_cache(llm, tokenizer):
    cached = LLM.from_parts(llm.model, tokenizer, prefix_cache=True)
    chats = [Conversation(each, PARAMS, system="the dog and the ball " * 12) for each in (llm, cached)]
    for question in ("the dog", "the ball"):
        first, second = ("".join(chat.ask(question)) for chat in chats)
        assert first == second
