"""Stored responses: bounded, and visible only to their owner."""

from __future__ import annotations

from olmoe.serve.responses_models import FunctionCall, FunctionCallOutput, ItemReference, Message, Reasoning
from olmoe.serve.responses_store import ResponseStore, StoredResponse, listed


def stored(name, text="hello", history=()):
    output = [
        {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
        },
        {"id": f"fc_{name}", "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "status": "x"},
    ]
    return StoredResponse(
        {"id": name, "output": output}, tuple(history), (Message(role="user", content="q", id=f"in_{name}"),)
    )


def test_a_conversation_consists_of_history_input_and_output():
    first = stored("a")
    assert [type(item) for item in first.conversation] == [Message, Message, FunctionCall]
    second = stored("b", history=first.conversation)
    assert [item.id for item in second.conversation] == ["in_a", "msg_a", "fc_a", "in_b", "msg_b", "fc_b"]


def test_owners_cannot_see_each_other():
    store = ResponseStore()
    store.add("me", stored("a"))
    assert store.get("me", "a") is not None
    assert store.get("you", "a") is None
    assert store.item("you", "msg_a") is None
    assert not store.remove("you", "a")
    assert store.item("me", "msg_a").content[0].text == "hello"
    assert store.remove("me", "a")
    assert store.get("me", "a") is None
    assert store.item("me", "msg_a") is None


def test_the_least_recently_used_are_evicted():
    store = ResponseStore(count=2)
    store.add("", stored("a"))
    store.add("", stored("b"))
    assert store.get("", "a")
    store.add("", stored("c"))
    assert [store.get("", name) is not None for name in "abc"] == [True, False, True]
    assert store.item("", "fc_b") is None
    assert store.item("", "fc_c") is not None


def test_stored_bytes_are_bounded():
    store = ResponseStore(size=5000)
    for i in range(20):
        store.add("", stored(f"r{i}", text="x" * 1000))
        assert 1 <= len(store) <= 4
    assert store.get("", "r19") is not None
    store.add("", stored("large", text="x" * 6000))
    assert store.get("", "large") is None
    assert store.get("", "r19") is not None


def test_empty_items_count_too():
    store = ResponseStore(size=100_000)
    empty = tuple(Message(role="user", content="") for _ in range(250))
    store.add("", StoredResponse({"id": "a", "output": []}, (), empty))
    assert store.get("", "a") is None
    store.add("", StoredResponse({"id": "b", "output": []}, empty[:100], empty[:100]))
    assert store.get("", "b") is not None


def test_a_resent_item_lives_as_long_as_its_last_response():
    store = ResponseStore()
    store.add("", stored("a"))
    again = Message(role="assistant", content="hello", id="msg_a")
    store.add("", StoredResponse({"id": "b", "output": []}, (), (again,)))
    store.remove("", "a")
    assert store.item("", "msg_a") is again


def test_input_items_are_listed_with_content_parts():
    items = [
        Message(role="user", content="q", id="m"),
        FunctionCallOutput(type="function_call_output", call_id="c", output="2"),
        Reasoning(type="reasoning", id="r"),
    ]
    part = {"type": "input_text", "text": "q"}
    assert listed(items) == [
        {"type": "message", "role": "user", "content": [part], "id": "m", "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": "2", "status": "completed"},
        {"type": "reasoning", "id": "r"},
    ]  # fmt: skip
    assert ItemReference(id="x").type == "item_reference"
