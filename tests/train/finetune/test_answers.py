"""Answers in the log are those that the engine would generate."""

from __future__ import annotations

from conftest import make_model
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.train.finetune.answers import answer, prompt_of
from olmoe.train.finetune.chats import Completion, Conversation


def test_logged_answers_are_those_of_greedy_decoding(tokenizer):
    model = make_model()
    chat = [{"role": "user", "content": "the dog"}]
    llm = LLM.from_parts(model, tokenizer, backend="torch")
    expected = llm.chat(chat, SamplingParams(max_new_tokens=12, temperature=0.0), show_progress=False)[0].text
    whole = Conversation([*chat, {"role": "assistant", "content": "x"}], (False, True))
    text, ids = prompt_of(whole, tokenizer)
    assert text.endswith("<|user|>\nthe dog\n<|assistant|>\n")
    assert answer(model, tokenizer, ids, 12) == expected
    assert len(answer(model, tokenizer, prompt_of(Completion("", "x"), tokenizer)[1], 3)) > 0
