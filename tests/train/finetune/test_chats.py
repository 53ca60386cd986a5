"""Every chat format gives the same messages; invalid samples are refused with their line number."""

from __future__ import annotations

import json

import pytest

from olmoe.errors import ConfigError
from olmoe.train.finetune.chats import Completion, Conversation, read_samples
from sentences import refused

ASKED, ANSWERED = {"role": "user", "content": "Hello\n\nJane"}, {"role": "assistant", "content": "Hi!"}
SYSTEM = {"role": "system", "content": "Be kind."}


def read(tmp_path, *rows, name="chats.jsonl", **options):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return list(read_samples(path, **options))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, ASKED, ANSWERED]},
        {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "Hello\n\nJane"}]}, ANSWERED]},
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "Hello\n\nJane"}, {"from": "gpt", "value": "Hi!"}],
        },
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hello\n\nJane"},
                {"from": "gpt", "value": "Hi!"},
            ]
        },
        {"system": "Be kind.", "instruction": "Hello", "input": "Jane", "output": "Hi!"},
        {"system": "Be kind.", "instruction": "Hello\n\nJane", "input": "", "output": "Hi!"},
        {"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]},
        {"prompt": [SYSTEM, ASKED], "response": "Hi!"},
        {"messages": [SYSTEM | {"role": "developer"}, ASKED | {"role": "User"}, ANSWERED | {"role": "gpt"}]},
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("Hello", "", "Jane")]},
                ANSWERED,
            ]
        },  # as olmoe serve joins them
    ],
)
def test_every_format_gives_the_same_messages(tmp_path, row):
    (sample,) = read(tmp_path, row)
    assert isinstance(sample, Conversation)
    assert sample.messages == [SYSTEM, ASKED, ANSWERED]
    assert sample.trained == (False, False, True)


def test_plain_texts_are_not_chats_unless_declared(tmp_path):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert read(tmp_path, row) == [Completion("2 + 2 =", " 4")]
    (sample,) = read(tmp_path, row, chat=True)
    assert [m["content"] for m in sample.messages] == ["2 + 2 =", " 4"]


def test_history_weights_and_tools_are_read(tmp_path):
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    (sample,) = read(tmp_path, row)
    assert [m["content"] for m in sample.messages] == ["a", "b", "c", "d"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (sample,) = read(tmp_path, {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED], "tools": tools})
    assert sample.trained == (False, False, False, True)
    assert sample.tools == tools
    assert sample.messages[1] == ANSWERED  # the template does not see the weight


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "needs a list of messages"),
        (
            {"messages": [ASKED, ANSWERED | {"role": "bot"}]},
            "no message of the role \"assistant\", only of 'user', 'bot'",
        ),
        ({"messages": [{"content": "x"}]}, 'without a "role"'),
        ({"messages": [{"role": "user"}]}, "without a text"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "weight 0.5"),
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "from 'nobody'"),
        ({"instruction": "a", "output": 3}, "an output that is not a text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history"),
        ({"prompt": "a"}, "none of the known formats"),
        ([1], "not a JSON object"),
    ],
)
def test_invalid_samples_are_refused_with_their_line(tmp_path, row, says):
    message = refused(lambda: read(tmp_path, {"messages": [ASKED, ANSWERED]}, row), ConfigError)
    assert message.startswith("Line 2 of the data file ")
    assert says in message


def test_files_without_samples_are_refused(tmp_path):
    assert "holds no samples" in refused(lambda: read(tmp_path, name="empty.json"), ConfigError)
    assert "not JSON by its suffix" in refused(lambda: read(tmp_path, {"messages": []}, name="chats.txt"), ConfigError)
