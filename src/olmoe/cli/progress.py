"""The progress bar of a command."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def progress_bar(arguments: argparse.Namespace, title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, as the function that moves it; none is drawn before its first call, so errors stand alone.

    On a terminal only, and not with `--quiet`.
    """
    from tqdm import tqdm

    with ExitStack() as stack:

        @functools.cache
        def bar() -> Any:
            disable = arguments.quiet or None
            return stack.enter_context(tqdm(unit=unit, unit_scale=True, desc=title, disable=disable))

        def progress(done: int, total: int) -> None:
            bar().total = total
            bar().update(done - bar().n)

        yield progress
