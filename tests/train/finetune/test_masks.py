"""Only the assistant's tokens and the end of its text are trained, whatever the tokenizer merges."""

from __future__ import annotations

import pytest

from olmoe.errors import ConfigError
from olmoe.io import hub
from olmoe.tokenizer import Tokenizer
from olmoe.train.finetune.chats import Completion, Conversation, conversation
from olmoe.train.finetune.masks import IGNORE, make_example, make_examples
from sentences import refused

# The template of the released OLMoE-Instruct, which has no generation marks.
RELEASED = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_folder(hub.resolve(hub.SHIPPED), eos_ids=(4095,), pad_id=1)


@pytest.fixture(scope="module")
def released(olmoe_tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50279,), pad_id=1)


def chat(*texts: str, trained: tuple[bool, ...] | None = None) -> Conversation:
    roles = [("user", "assistant")[i % 2] for i in range(len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return Conversation(messages, trained or tuple(role == "assistant" for role in roles))


def learned(example, tokenizer: Tokenizer) -> list[str]:
    """Each run of trained ids as text."""
    runs: list[list[int]] = [[]]
    for label in example.labels.tolist():
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


@pytest.mark.parametrize("name", ["tiny", "released"])
def test_answers_and_their_end_tokens_are_trained(name, request):
    tokenizer = request.getfixturevalue(name)
    example = make_example(chat("Hello", "Hi, Jane!", "Bye ", "Bye 🐘."), tokenizer)
    assert learned(example, tokenizer) == ["Hi, Jane!<|endoftext|>", "Bye 🐘.<|endoftext|>"]
    text = tokenizer.decode(example.inputs.tolist(), skip_special_tokens=False)
    assert (
        text
        == "<|endoftext|><|user|>\nHello\n<|assistant|>\nHi, Jane!<|endoftext|>\n<|user|>\nBye \n<|assistant|>\nBye 🐘."
    )
    ids = tokenizer.encode_rendered(text + "<|endoftext|>")
    assert example.inputs.tolist() == ids[:-1]
    assert all(label in (IGNORE, next_id) for label, next_id in zip(example.labels.tolist(), ids[1:], strict=True))


def test_an_answer_merged_with_the_header_is_trained_whole(released):
    """Here the prompt's ids are not a prefix of the chat's, although other trainers rely on that."""
    sample = chat("Hello", "\n\nHi")
    prompt = released.encode_chat(sample.messages[:1])
    example = make_example(sample, released)
    assert example.inputs.tolist()[: len(prompt)] != prompt
    assert learned(example, released) == ["\n\n\nHi<|endoftext|>"]


def test_ids_equal_the_tokenized_chat(released):
    sample = chat("What is\tthis? e\u0301", "  indented\r\n\r\n and\u3000wide e\u0301")
    example = make_example(sample, released)
    text, _ = released.render_answers(sample.messages)
    assert example.inputs.tolist() == released.encode_rendered(text)[: len(example.inputs)]
    assert learned(example, released) == [
        "  indented\r\n\r\n and\u3000wide é<|endoftext|>"
    ]  # the tokenizer normalizes to composed characters


def test_templates_without_generation_marks_give_the_same_masks(olmoe_tokenizer_file, released):
    unmarked = Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50279,), chat_template=RELEASED)
    for sample in (chat("Hello", "\n\nHi"), chat("a", "b", "c", "d"), chat("a", "")):
        one, other = (make_example(sample, tokenizer) for tokenizer in (released, unmarked))
        assert one.inputs.tolist() == other.inputs.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_the_end_of_text_is_recognized_by_id(olmoe_tokenizer_file):
    """In the post-trained 0125 models the end-of-text id has another text."""
    other = Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=(50277,))
    example = make_example(chat("a", "b"), other)
    assert example.labels.tolist()[-1] == 50277


def test_last_turn_and_weights_select_answers(tiny):
    four = ("Hello", "Hi", "And?", "Well")
    assert learned(make_example(chat(*four), tiny, "last"), tiny) == ["Well<|endoftext|>"]
    weighted = chat(*four, trained=(False, True, False, False))
    assert learned(make_example(weighted, tiny), tiny) == ["Hi<|endoftext|>"]
    with pytest.raises(ConfigError, match="no token of it would be trained"):
        make_example(weighted, tiny, "last")


def test_plain_texts_use_no_template(tiny):
    example = make_example(Completion("Once upon a", " time\n"), tiny)
    assert learned(example, tiny) == [" time\n<|endoftext|>"]
    assert tiny.decode(example.inputs.tolist()) == "Once upon a time\n"
    with pytest.raises(ConfigError, match="no token of it would be trained"):
        make_example(Completion("", ""), tiny)


def test_a_completion_that_joins_its_prompt_is_trained_whole(released):
    example = make_example(Completion("Oh, Hel", "lo 🐘"), released)
    assert learned(example, released) == [" Hello 🐘<|endoftext|>"]
    assert example.inputs.tolist() == released.encode("Oh, Hello 🐘")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes no end of text"),
        ("{% for m in messages %}{{ m['content'] | upper | replace('B', 'x') }}{{ eos_token }}{% endfor %}", ""),
        ("{% for m in messages %}{{ m['content'] | length }}{{ eos_token }}{% endfor %}", "changes what the assistant"),
        ("{{ messages[0]['content'] }}{{ eos_token }}", "writes 0 answers where the assistant has 1"),
    ],
)
def test_templates_that_hide_the_answers_are_refused(template, says, tokenizer_file):
    tokenizer = Tokenizer.from_file(tokenizer_file, eos_ids=(319,), chat_template=template)
    if not says:
        assert tokenizer.decode(make_example(chat("a", "b"), tokenizer).labels[-2:-1].tolist()) == "x"
        return
    message = refused(
        lambda: make_examples([chat("a", "b")], tokenizer, length=64, turns="all", too_long="cut", file="here"),
        ConfigError,
    )
    assert message.startswith("Sample 1 of here")
    assert says in message


def test_a_role_that_the_template_leaves_out_is_refused(tiny, tokenizer_file):
    """Its answer was trained without what it answers, with a warning at most."""
    misspelled = conversation([{"role": "usr", "content": "Hello"}, {"role": "assistant", "content": "Hi"}], "here")
    message = refused(
        lambda: make_examples([misspelled], tiny, length=64, turns="all", too_long="cut", file="here"), ConfigError
    )
    assert "the chat template leaves out messages of the role 'usr'; use system, user or assistant" in message
    own = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    assert make_example(misspelled, Tokenizer.from_file(tokenizer_file, eos_ids=(319,), chat_template=own)).trained


def test_long_samples_are_cut_dropped_or_refused(tiny):
    samples = [chat("a", "b c d e f g h i j k l"), chat("a " * 40, "b"), chat("x", "y")]

    def examples(too_long, length=28):
        return make_examples(samples, tiny, length=length, turns="all", too_long=too_long, file="here")

    whole = [make_example(sample, tiny) for sample in samples]
    assert len(whole[0].inputs) > 28 > len(whole[2].inputs)
    kept, count = examples("cut")
    assert [len(example.inputs) for example in kept] == [28, len(whole[2].inputs)]
    assert kept[0].labels.tolist() == whole[0].labels.tolist()[:28]
    assert (count.samples, count.cut, count.dropped) == (3, 1, 1)
    kept, count = examples("drop")
    assert len(kept) == 1
    assert count.dropped == 2
    assert "set data.too_long" in refused(lambda: examples("refuse"), ConfigError)
    assert "None of the 3 samples" in refused(lambda: examples("cut", 3), ConfigError)
