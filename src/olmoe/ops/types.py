"""Types that the operations exchange."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SortedRows(NamedTuple):
    """The M = N*K routed rows of N tokens, ordered by expert (stable: ties by token).

    - `order_M`: sorted place -> flat row n*K + k.
    - `token_ids_M`: sorted place -> token n.
    - `position_NK`: (token, slot) -> sorted place; the inverse of `order_M`.
    - `offsets_E` (E+1,): the rows of expert e are `offsets_E[e] : offsets_E[e+1]`.
    """

    order_M: Tensor
    token_ids_M: Tensor
    position_NK: Tensor
    offsets_E: Tensor
