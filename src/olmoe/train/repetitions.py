"""Windows that repeat themselves: the filter in the loop of OLMoE's training.

Its data still held runs of one n-gram (markup, tables, broken documents), which make losses jump and teach nothing. A
window with such a run keeps its place in the order and in what losses are divided by, and trains routers' losses, but
none of its predictions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST = 13  # ids of a repeated n-gram, as in OLMoE's training


def has_repetition(ids: npt.NDArray[Any], times: int, longest: int = LONGEST) -> bool:
    """Whether an n-gram of 1 to `longest` ids occurs `times` times or more, one right after the other."""
    for period in range(1, min(longest, len(ids) // times) + 1):
        # All but the first of the n-grams equal, id by id, what stands a period before.
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        ends = np.concatenate(([-1], differs, [len(ids) - period]))
        if np.diff(ends).max() - 1 >= (times - 1) * period:
            return True
    return False
