"""transformers' text generation around our model: batches and streaming."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from transformers import TextIteratorStreamer

import olmoe
from configurations import VOCAB_SIZE, small_config

PROMPTS = ["Once upon a time there was", "the dog", "One day the girl and the dog went"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def generate(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = olmoe.OlmoeForCausalLM(olmoe.OlmoeConfig(**small_config().to_dict()))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return olmoe.pipeline("text-generation", model=str(folder), device="cpu")


def test_a_batch_gives_the_texts_of_each_prompt_alone(generate):
    alone = [generate(prompt, **GREEDY)[0]["generated_text"] for prompt in PROMPTS]
    together = generate(PROMPTS, batch_size=3, **GREEDY)
    assert [texts[0]["generated_text"] for texts in together] == alone
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(alone, PROMPTS, strict=True))


def test_several_samples_and_return_full_text_false(generate):
    samples = generate(PROMPTS[1], max_new_tokens=8, do_sample=True, num_return_sequences=3, return_full_text=False)
    assert len({sample["generated_text"] for sample in samples}) > 1
    assert not any(sample["generated_text"].startswith(PROMPTS[1]) for sample in samples)


def test_streaming_gives_the_text_in_parts(generate):
    settings = GREEDY | {"max_new_tokens": 40}  # the streamer holds text back until a space
    expected = generate(PROMPTS[0], return_full_text=False, **settings)[0]["generated_text"]
    streamer = TextIteratorStreamer(generate.tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=generate, args=(PROMPTS[0],), kwargs={"streamer": streamer, **settings})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces) == expected


def test_generation_stops_at_the_end_of_text(generate):
    with torch.no_grad():
        head = generate.model.lm_head.weight
        kept = head[VOCAB_SIZE - 1].clone()
        # The end of text now wins over every other token.
        direction = generate.model(**generate.tokenizer(PROMPTS[1], return_tensors="pt"), output_hidden_states=True)
        head[VOCAB_SIZE - 1] = direction.hidden_states[-1][0, -1] * 100
        text = generate(PROMPTS[1], max_new_tokens=8, do_sample=False)[0]["generated_text"]
        head[VOCAB_SIZE - 1] = kept
    assert text == PROMPTS[1]
