"""What a user is told: one sentence, whatever was wrong."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from olmoe.errors import UserError


def refused(build: Callable[[], object], kind: type[UserError] = UserError) -> str:
    """The message with which `build` is refused: one sentence of bearable length on one line."""
    with pytest.raises(kind) as caught:
        build()
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]{10,900}[^.\s]\.", message), message
    assert not re.search(r"[.!?] +[A-Z]", message), message
    return message
