"""Arrays that are mapped from files, some of which are larger than memory. No torch."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np


def forget(array: np.ndarray[Any, Any]) -> None:
    """Release the pages that were read of a mapped array, or of a part of one; other arrays are left alone.

    Until then they count as memory of this process. What is read again comes from the system's cache or from the file.
    """
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap):
        with contextlib.suppress(AttributeError, OSError):  # not every system has it
            base.madvise(mmap.MADV_DONTNEED)
