"""Responses that a client may refer to by their ids: a limited number, kept in memory.

With `previous_response_id` a client continues a conversation and sends only what is new. The least recently used are
forgotten first; nothing outlives the server.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from olmoe.serve.responses_models import Item
from olmoe.serve.responses_output import output_items


@dataclass(frozen=True)
class StoredResponse:
    """A response and the conversation that it answers: `history` is what came before its own `input`."""

    response: dict[str, Any]
    history: tuple[Item, ...]
    input: tuple[Item, ...]

    @functools.cached_property
    def own_items(self) -> tuple[Item, ...]:
        """Its input and its output."""
        return (*self.input, *output_items(self.response))

    @property
    def all_input(self) -> tuple[Item, ...]:
        """Everything that it answers."""
        return (*self.history, *self.input)

    @property
    def conversation(self) -> tuple[Item, ...]:
        """Everything that the next request continues from."""
        return (*self.history, *self.own_items)


# Memory taken by an item of the input besides its text, which may be shorter than that.
_ITEM_BYTES = 512


class ResponseStore:
    """At most `count` responses of `size` bytes in total: their JSON, plus an overhead for each item.

    Each belongs to an owner and is hidden from others. The size of a response includes the whole conversation before
    it, even where responses share that.
    """

    def __init__(self, *, count: int = 1000, size: int = 64 * 2**20) -> None:
        self._count = count
        self._size = size
        self._stored: OrderedDict[tuple[str, str], tuple[StoredResponse, int]] = OrderedDict()
        self._items: dict[tuple[str, str], Item] = {}
        self._used = 0

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, owner: str, stored: StoredResponse) -> None:
        """Keep a response, and forget others if there are too many. One that is too large is not kept."""
        size = _size(stored)
        if size > self._size:
            return
        self._stored[owner, stored.response["id"]] = (stored, size)
        self._used += size
        for item in stored.own_items:
            if item.id is not None:
                self._items[owner, item.id] = item
        while len(self._stored) > self._count or self._used > self._size:
            oldest = next(iter(self._stored))
            self.remove(*oldest)

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """The owner's response of this id, if it is still known."""
        key = (owner, response_id)
        if key not in self._stored:
            return None
        self._stored.move_to_end(key)
        return self._stored[key][0]

    def item(self, owner: str, item_id: str) -> Item | None:
        """An item of one of the owner's responses, for an `item_reference`."""
        return self._items.get((owner, item_id))

    def remove(self, owner: str, response_id: str) -> bool:
        """Forget a response; returns whether it was known."""
        stored, size = self._stored.pop((owner, response_id), (None, 0))
        if stored is None:
            return False
        self._used -= size
        for item in stored.own_items:
            if item.id is not None and self._items.get((owner, item.id)) is item:  # not sent again in a later request
                del self._items[owner, item.id]
        return True


def _size(stored: StoredResponse) -> int:
    texts = len(json.dumps(stored.response)) + sum(_item_size(item) for item in (*stored.history, *stored.input))
    return texts + _ITEM_BYTES * len(stored.input)  # those of the history are shared


def _item_size(item: Item) -> int:
    return len(item.model_dump_json())


def listed(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as `GET /v1/responses/{id}/input_items` shows them: a message's content is a list of parts."""
    shown = []
    for item in items:
        fields = item.model_dump(exclude_none=True)
        if isinstance(fields.get("content"), str):
            kind = "output_text" if fields["role"] == "assistant" else "input_text"
            fields["content"] = [{"type": kind, "text": fields["content"]}]
        if fields["type"] != "reasoning":
            fields.setdefault("status", "completed")
        shown.append(fields)
    return shown
