"""Stop strings and whole characters in streamed text, against the same rule applied to the finished text."""

from __future__ import annotations

import random

import pytest

from olmoe.engine.text_stream import TextStream


def run(tokenizer, ids, stop=()) -> tuple[list[str], TextStream]:
    """The text parts of `ids` up to a stop string or the end, and the stream afterwards."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for i in ids:
        pieces.append(stream.add(i))
        if stream.stopped:
            return pieces, stream
    pieces.append(stream.finish())
    return pieces, stream


def expected_text(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The rule, one character at a time: end before the first complete stop string, the longest if several."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def test_without_stop_strings_text_appears_with_each_id(tokenizer):
    ids = tokenizer.encode("Once upon a time")
    pieces, stream = run(tokenizer, ids)
    assert len(ids) > 3
    assert all(pieces[:-1])
    assert pieces[-1] == ""
    assert "".join(pieces) == stream.text == "Once upon a time"
    assert not stream.stopped


def test_a_stop_string_across_tokens_ends_the_text_before_it(tokenizer):
    ids = tokenizer.encode("The dog ran to the ball.")
    pieces, stream = run(tokenizer, ids, ("an to t",))
    assert stream.stopped
    assert stream.text == "".join(pieces) == "The dog r"
    assert len(pieces) < len(ids)
    assert (stream.add(ids[0]), stream.finish(), stream.text) == ("", "", "The dog r")  # nothing after it


def test_possible_stop_strings_are_held_back_and_then_released(tokenizer):
    ids = [tokenizer.encode(c)[0] for c in "abcabd"]
    pieces, stream = run(tokenizer, ids, ("abcd",))
    assert pieces == ["", "", "", "abc", "", "abd", ""]
    assert not stream.stopped
    pieces, stream = run(tokenizer, ids[:3], ("abcd",))
    assert pieces == ["", "", "", "abc"]  # the end of the text decides
    assert not stream.stopped


def test_the_first_of_several_stop_strings_counts(tokenizer):
    ids = tokenizer.encode("One day the girl and the dog")
    for stop in (("dog", "girl"), ("girl", "dog")):
        assert run(tokenizer, ids, stop)[1].text == "One day the "
    assert run(tokenizer, ids, ("girl", "the girl"))[1].text == "One day "  # both complete at once: the longer
    assert run(tokenizer, ids, ("the girl and", "girl"))[1].text == "One day the "  # complete first


def test_the_text_does_not_depend_on_how_it_was_split_into_tokens(tokenizer):
    words = [i for i in range(2, tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"he"]
    assert words  # "he" exists as one token and as two
    split = [tokenizer.encode(c)[0] for c in "he"]
    for stop in (("h", "he"), ("he", "h"), ("e", "he"), ("he", "e")):
        assert run(tokenizer, words, stop)[1].text == run(tokenizer, split, stop)[1].text


def test_random_texts_end_where_the_rule_says_they_do(tokenizer):
    rng = random.Random(0)
    stopped = 0
    alphabet = [tokenizer.encode(c) for c in "ab"] + [tokenizer.encode("é"), tokenizer.encode(" a")]
    for _ in range(3000):
        ids = [i for _ in range(rng.randint(0, 12)) for i in rng.choice(alphabet)]
        stop = tuple("".join(rng.choices("ab é", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3)))
        pieces, stream = run(tokenizer, ids, stop)
        text, ends = expected_text(tokenizer.decode(ids), stop)
        assert (stream.text, stream.stopped) == (text, ends)
        assert "".join(pieces) == text
        stopped += ends
    assert 500 < stopped < 2900


@pytest.mark.parametrize("stop", [(), ("é!",)])
def test_an_unfinished_character_appears_only_at_the_end(tokenizer, stop):
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert run(tokenizer, ids[:1], stop)[0] == ["", "\ufffd"]
    assert "".join(run(tokenizer, ids, stop)[0]) == "é"


def test_special_tokens_have_no_text_and_do_not_interrupt_stop_strings(tokenizer):
    a, b = (tokenizer.encode(c)[0] for c in "ab")
    eos = tokenizer.eos_ids[0]
    assert run(tokenizer, [a, eos, a, b], ("ab",))[1].text == "a"
    assert run(tokenizer, [a, eos, b], ("ab",))[1].stopped
