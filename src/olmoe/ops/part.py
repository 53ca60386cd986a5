"""The part of a mixture that some of its experts contribute, for where several processes share them.

Shapes legend: N tokens, D hidden, Ep experts that are here, K experts per token, M rows of choices of these,
F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe.ops.autocast import autocast_dtype
from olmoe.ops.cpu import training
from olmoe.ops.dispatch import AUTO, call
from olmoe.ops.reference import Activation
from olmoe.ops.types import SortedRows


def moe_part(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    first: int,
    *,
    products: torch.dtype | None = None,
    backend: str = AUTO,
) -> Tensor:
    """What the experts with the ids from `first` on add to `ops.moe`; choices of any others add nothing.

    gate_up (Ep, 2F, D) and down (Ep, D, F) are those of the experts that are here. The sum over all parts is the whole
    mixture. x (N, D) -> (N, D).
    """

    def plain(x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        own_NK = (expert_ids_NK >= first) & (expert_ids_NK < first + len(gate_up))
        ids_NK = (expert_ids_NK - first).masked_fill(~own_NK, len(gate_up))
        weights_NK = weights_NK.masked_fill(~own_NK, 0.0)
        return _part(x, weights_NK, ids_NK, gate_up, down, activation, products, backend)

    tensors = x, weights_NK, expert_ids_NK, gate_up, down
    if activation is F.silu and backend in (AUTO, "torch") and autocast_dtype(x) is None:
        numbers = x, weights_NK, gate_up, down
        if products is None:
            takes = training.takes(*numbers, indices=expert_ids_NK)
        else:
            takes = training.takes_products(products, *numbers, indices=expert_ids_NK)
        if takes:
            return training.moe(*tensors, plain, products, first)
    return plain(*tensors)


def _part(
    x: Tensor,
    weights_NK: Tensor,
    ids_NK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    products: torch.dtype | None,
    backend: str,
) -> Tensor:
    """`moe_part` where ids count from the first expert that is here; those of others are Ep, with weights of zero."""
    weights = gate_up, down, activation
    if not len(x):
        out_ND: Tensor = _moe(x, weights_NK, ids_NK, *weights, products, backend)
        return out_ND
    rows = chosen_rows(ids_NK, len(gate_up), backend)
    chosen_MD = call("gather_rows", backend, x, rows)[: len(rows.order_M) - 1]
    if products is None:
        out_MD = call("experts", backend, chosen_MD, rows.offsets_E, *weights)
    else:  # a mixture of one expert for each row
        ids_M = torch.repeat_interleave(rows.offsets_E.diff(), output_size=len(chosen_MD))
        one_M1 = chosen_MD.new_ones(len(chosen_MD), 1)
        out_MD = _moe(chosen_MD, one_M1, ids_M.unsqueeze(1), *weights, products, backend)
    summed_ND: Tensor = call("combine", backend, F.pad(out_MD, (0, 0, 0, 1)), weights_NK, rows)
    return summed_ND


def _moe(x: Tensor, weights_NK: Tensor, ids_NK: Tensor, *rest: Any) -> Any:
    *weights, products, backend = rest
    if products is None:
        return call("moe", backend, x, weights_NK, ids_NK, *weights)
    return call("lowered_moe", backend, x, weights_NK, ids_NK, *weights, products)


def chosen_rows(ids_NK: Tensor, count: int, backend: str = AUTO) -> SortedRows:
    """The choices with ids below `count`, sorted by these; behind them one row that stands for all others.

    What is gathered by it for that row means nothing, and what is combined by it must be zero there.
    """
    order = call("sort_by_expert", backend, ids_NK, count + 1)
    offsets_E = order.offsets_E[: count + 1]
    chosen = int(offsets_E[-1])
    order_M = F.pad(order.order_M, (0, 1))[: chosen + 1]  # padded for the case that there are no others
    return SortedRows(order_M, order_M // ids_NK.shape[1], order.position_NK.clamp(max=chosen), offsets_E)
