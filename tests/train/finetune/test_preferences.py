"""Every preference format gives the same pairs, with nothing of the prompt in the answer."""

from __future__ import annotations

import json

import pytest

from olmoe.errors import ConfigError
from olmoe.train.finetune.chats import Completion, Conversation
from olmoe.train.finetune.preferences import read_judged, read_pairs
from sentences import refused

ASKED = {"role": "user", "content": "q"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def write(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, False),
        ({"prompt": "q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, False),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, False),
        ({"prompt": [ASKED], "chosen": "good", "rejected": "bad"}, False),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, True),
    ],
)
def test_every_format_gives_the_same_pairs(tmp_path, row, chat):
    (pair,) = read_pairs(write(tmp_path, row), chat=chat)
    assert pair.chosen == Conversation([ASKED, GOOD], (False, True))
    assert pair.rejected == Conversation([ASKED, BAD], (False, True))


def test_earlier_turns_are_not_trained_on(tmp_path):
    before = [ASKED, GOOD, ASKED]
    (pair,) = read_pairs(write(tmp_path, {"prompt": before, "chosen": [GOOD], "rejected": [BAD]}))
    assert pair.chosen.trained == (False, False, False, True)


def test_plain_texts_stay_plain(tmp_path):
    (pair,) = read_pairs(write(tmp_path, {"prompt": "q", "chosen": " good", "rejected": " bad"}))
    assert (pair.chosen, pair.rejected) == (Completion("q", " good"), Completion("q", " bad"))


def test_kto_takes_judged_answers_and_pairs(tmp_path):
    rows = [
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": "q", "completion": "bad", "label": False},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    found = list(read_judged(write(tmp_path, *rows)))
    assert [each.desirable for each in found] == [True, False, True, False]
    assert found[1].sample == found[3].sample == Completion("q", "bad")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "x"}, '"chosen" and "rejected"'),
        ({"chosen": "x", "rejected": "y"}, 'needs the "prompt"'),
        ({"chosen": [GOOD], "rejected": [BAD]}, 'needs a "prompt"'),
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "the same answer"),
        ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [BAD]}, "does not end with the assistant"),
    ],
)
def test_invalid_pairs_are_refused_with_their_line(tmp_path, row, says):
    message = refused(lambda: list(read_pairs(write(tmp_path, row))), ConfigError)
    assert message.startswith("Line 1 of")
    assert says in message
