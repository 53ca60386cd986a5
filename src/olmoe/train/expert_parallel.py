"""Experts that several ranks share: each holds some of them whole, and rows travel to the experts that they chose.

A token travels once to each rank that has experts which it chose, with its routing, and their weighted sum comes back:

    counts -> tokens to the ranks -> [sort, gather, experts, combine] there -> sums back -> sum over ranks

With 8 experts a token and 2 ranks that is a quarter of the rows that travel if each choice does.

Shapes legend: N tokens, D hidden, E experts, K experts per token, M routed rows, P ranks that share the experts,
Ep = E/P experts of one rank, S tokens that one sends, R tokens that arrive at one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from olmoe import ops
from olmoe.config import ModelConfig
from olmoe.model import Experts, activation
from olmoe.ops import SortedRows

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class Dispatch:
    """Lets tokens be computed where their experts are. Every rank of `group` must call it, if only with no tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def __call__(
        self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, num_experts: int, compute: Compute
    ) -> Tensor:
        """The weighted sum of each token's experts, wherever they are: x (N, D), ids and weights (N, K) -> (N, D).

        `compute` is called with the tokens (R, D) that chose experts of this rank, which of their choices these are
        (R, K), counted from its own first one and Ep where another rank has them, and their weights (R, K).
        """
        own = num_experts // self.size
        to_NK = expert_ids_NK // own
        # A token goes to each rank once, however many experts it chose there.
        again_NK = (to_NK.unsqueeze(2) == to_NK.unsqueeze(1)).tril(-1).any(dim=-1)
        there = chosen_rows(to_NK.masked_fill(again_NK, self.size), self.size)
        sent_P = there.offsets_E.diff()
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group)
        sent, received = torch.stack((sent_P, received_P)).tolist()
        routing_N2K = torch.cat((expert_ids_NK.float(), weights_NK.float()), dim=1)
        leaving = (ops.gather_rows(t, there)[: sum(sent)] for t in (x_ND, routing_N2K))
        arrived_RD, routing_R2K = _Exchange.apply(received, sent, self.group, *leaving)
        ids_RK, weights_RK = routing_R2K.tensor_split(2, dim=1)
        ids_RK = ids_RK.detach().long() - self.rank * own
        ids_RK = ids_RK.masked_fill((ids_RK < 0) | (ids_RK >= own), own)
        results_RD = compute(arrived_RD, ids_RK, weights_RK)
        (back_SD,) = _Exchange.apply(sent, received, self.group, results_RD)
        ones_NK = (~again_NK).to(weights_NK.dtype)
        total_ND: Tensor = ops.combine(F.pad(back_SD, (0, 0, 0, 1)), ones_NK, there)
        return total_ND


class ExpertsAcrossRanks(Experts):
    """Takes the place of a layer's `Experts` where the ranks of a mesh share them; names and results are the same.

    The parameters are DTensors of all experts, of which each rank holds Ep consecutive ones.
    """

    def __init__(self, config: ModelConfig, mesh: DeviceMesh, device: torch.device) -> None:
        nn.Module.__init__(self)
        e, d, f = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts, self.hidden_dim, self.intermediate_dim = e, d, f
        self.act_fn = activation(config.hidden_act)
        self.dispatch = Dispatch(mesh.get_group())
        self.gate_up_proj = _shared(torch.empty(e // mesh.size(), 2 * f, d, device=device), mesh)
        self.down_proj = _shared(torch.empty(e // mesh.size(), d, f, device=device), mesh)

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D)."""
        return self.dispatch(x_ND, expert_ids_NK, weights_NK, self.num_experts, self._own)

    def _own(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """The weighted sum of this rank's experts; ids of Ep are not its own."""
        gate_up, down = (_local(weight) for weight in (self.gate_up_proj, self.down_proj))
        if not len(x_RD):
            return self._experts(x_RD, ids_RK.new_zeros(len(gate_up) + 1), gate_up, down)
        rows = chosen_rows(ids_RK, len(gate_up))
        own = slice(0, len(rows.token_ids_M) - 1)
        out_MD = self._experts(ops.gather_rows(x_RD, rows)[own], rows.offsets_E, gate_up, down)
        return ops.combine(F.pad(out_MD, (0, 0, 0, 1)), weights_RK.masked_fill(ids_RK == len(gate_up), 0.0), rows)

    def _experts(self, rows_RD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if self.products is not None:  # a mixture of one expert for each row
            ids_R = torch.repeat_interleave(offsets_E.diff(), output_size=len(rows_RD))
            one_R1 = rows_RD.new_ones(len(rows_RD), 1)
            inputs = rows_RD, one_R1, ids_R.unsqueeze(1), gate_up, down, self.activation
            return ops.moe(*inputs, products=self.products, backend=self.backend)
        return ops.experts(rows_RD, offsets_E, gate_up, down, self.activation, backend=self.backend)


class _Exchange(torch.autograd.Function):
    """all-to-all of the rows of each tensor: `sent[p]` of them to rank p, `received[p]` from it, in the order of ranks.

    All in one function, so that in backward, too, every rank exchanges all of them, in one order.
    """

    @staticmethod
    def forward(
        ctx: Any, received: list[int], sent: list[int], group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return tuple(_exchange(rows, received, sent, group) for rows in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(_exchange(grad, ctx.sent, ctx.received, ctx.group) for grad in gradients))


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def chosen_rows(ids_NK: Tensor, count: int) -> SortedRows:
    """The choices with ids below `count`, sorted by these; behind them one row that stands for all others.

    What is gathered by it for that row means nothing, and what is combined by it must be zero there.
    """
    order = ops.sort_by_expert(ids_NK, count + 1)
    offsets_E = order.offsets_E[: count + 1]
    chosen = int(offsets_E[-1])
    order_M = F.pad(order.order_M, (0, 1))[: chosen + 1]  # padded for the case that there are no others
    return SortedRows(order_M, order_M // ids_NK.shape[1], order.position_NK.clamp(max=chosen), offsets_E)


def _shared(own: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()
