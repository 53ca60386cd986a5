"""Experts that several ranks share: each holds some of them whole, and rows travel to the experts that they chose.

The mixture's own operations stay as they are; a `Dispatch` stands between sorting and experts:

    sort_by_expert -> gather_rows -> [counts, rows to their ranks -> sort -> experts -> unsort -> rows back] -> combine

Shapes legend: N tokens, D hidden, E experts, K experts per token, M = N*K routed rows, F expert width, P ranks that
share the experts, Ep = E/P experts of one rank, R rows that arrive at one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from olmoe import ops
from olmoe.config import ModelConfig
from olmoe.model import Experts, activation
from olmoe.ops import SortedRows


class Dispatch:
    """Lets rows be computed where their experts are. Every rank of `group` must call it, if only with no rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size = group, group.size()

    def __call__(self, rows_MD: Tensor, offsets_E: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Rows sorted by expert (M, D) and offsets (E+1,) -> their results (M, D) in the same order.

        `compute` is called with the rows of this rank's own experts, from all ranks, and their offsets (Ep+1,).
        """
        sent_PE = offsets_E.diff().view(self.size, -1)  # (P, Ep): for each rank, the rows of each of its experts
        received_PE = torch.empty_like(sent_PE)  # (P, Ep): from each rank, the rows of each of ours
        dist.all_to_all_single(received_PE, sent_PE, group=self.group)
        sent, received = torch.stack((sent_PE.sum(dim=1), received_PE.sum(dim=1))).tolist()
        arrived_RD = _Exchange.apply(rows_MD, received, sent, self.group)
        order = _by_expert(received_PE, sum(received))
        results_RD = compute(ops.gather_rows(arrived_RD, order), order.offsets_E)
        back_RD = ops.gather_rows(results_RD, _inverse(order))
        results_MD: Tensor = _Exchange.apply(back_RD, sent, received, self.group)
        return results_MD


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
        rows = ops.sort_by_expert(expert_ids_NK, self.num_experts, backend=self.backend)
        out_MD = self.dispatch(ops.gather_rows(x_ND, rows, backend=self.backend), rows.offsets_E, self._own)
        return ops.combine(out_MD, weights_NK, rows, backend=self.backend)

    def _own(self, rows_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """The experts of this rank on their rows."""
        gate_up, down = (_local(weight) for weight in (self.gate_up_proj, self.down_proj))
        if self.products is not None:  # a mixture of one expert for each row
            ids_R = torch.repeat_interleave(offsets_E.diff(), output_size=len(rows_RD))
            one_R1 = rows_RD.new_ones(len(rows_RD), 1)
            inputs = rows_RD, one_R1, ids_R.unsqueeze(1), gate_up, down, self.activation
            return ops.moe(*inputs, products=self.products, backend=self.backend)
        return ops.experts(rows_RD, offsets_E, gate_up, down, self.activation, backend=self.backend)


class _Exchange(torch.autograd.Function):
    """all-to-all of rows: `sent[p]` of them to rank p, `received[p]` from it, in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def _by_expert(received_PE: Tensor, rows: int) -> SortedRows:
    """Rows that came rank by rank, from each sorted by expert, in the order of experts; ties by rank, then token."""
    ranks, experts = received_PE.shape
    ids_PE = torch.arange(experts, device=received_PE.device).repeat(ranks)
    ids_R = ids_PE.repeat_interleave(received_PE.flatten(), output_size=rows)
    return ops.sort_by_expert(ids_R.unsqueeze(1), experts)


def _inverse(order: SortedRows) -> SortedRows:
    """The order that undoes one in which every row occurs once."""
    position_R = order.position_NK.flatten()
    return SortedRows(position_R, position_R, order.order_M.unsqueeze(1), order.offsets_E)


def _shared(own: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()
