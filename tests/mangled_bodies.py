"""Bodies of requests that are almost right: valid ones of which some places were replaced, removed or doubled."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

HUGE = "a number of 5000 digits"  # which Python does not write
JUNK = st.sampled_from(
    [HUGE, {"a": HUGE}, {"7": 10**400}, {"7": HUGE}, [HUGE],
     None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
     "", "a", " ", "\0", "\u2028", "é" * 3, "<|endoftext|>", "auto", "text", "function", "none", "x" * 300,
     [], {}, [[]], [{}], [None], {"a": None}, {"type": "text"}, {"type": None},
     {"role": "user", "content": "a"}, ["a", 1],
     {"type": "object", "properties": {"a": {"type": "integer"}}}, {"$ref": "#"}, {"type": "string", "pattern": "("}]
)  # fmt: skip


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced, from the whole down."""
    found = [place]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*place, key))
    return found


@st.composite
def mangled(draw: Any, bodies: list[dict[str, Any]], fields: list[str]) -> Any:
    """One of `bodies` with up to three changes; a change may also add one of `fields` with junk."""
    body: Any = copy.deepcopy(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(0, 3))):
        if not isinstance(body, dict):
            break
        if draw(st.booleans()):
            body[draw(st.sampled_from(fields))] = copy.deepcopy(draw(JUNK))
            continue
        place = draw(st.sampled_from(_places(body)))
        if not place:
            body = copy.deepcopy(draw(JUNK))
            continue
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if change == "replace":
            holder[place[-1]] = copy.deepcopy(draw(JUNK))
        elif change == "remove":
            del holder[place[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
    return body


def encoded(body: Any) -> bytes:
    """The body as JSON."""
    return json.dumps(body).replace(json.dumps(HUGE), "9" * 5000).encode()
