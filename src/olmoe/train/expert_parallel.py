"""Experts that several ranks share: each holds some of them whole, and rows travel to the experts that they chose.

A token travels once to each rank that has experts which it chose, with its routing, and their weighted sum comes back:

    counts -> tokens to the ranks -> [part of the mixture] there -> sums back -> sum over ranks

With 8 experts a token and 2 ranks that is a quarter of the rows that travel if each choice does. Ranks of one machine,
where reading a row costs less than finding out who needs it, let each other read all of them:

    tokens for all to read -> [part of the mixture] -> sums for all to read -> sum over ranks

Shapes legend: N tokens, D hidden, E experts, K experts per token, P ranks that share the experts, Ep = E/P experts of
one rank, S tokens that one sends, R tokens that arrive at one.
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
from olmoe.train.one_machine import SharedMemory

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
# x (N, D), expert ids (N, K), their weights (N, K), and what computes the part of this rank's experts -> their sum
# over all ranks (N, D). Every rank must call it, if only with no tokens.
Dispatch = Callable[[Tensor, Tensor, Tensor, Compute], Tensor]


class DispatchByMessages:
    """Lets tokens be computed where their experts are, wherever that is."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.size, self.own = group, group.size(), num_experts // group.size()

    def __call__(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, compute: Compute) -> Tensor:
        """See `Dispatch`."""
        to_NK = expert_ids_NK // self.own
        # A token goes to each rank once, however many experts it chose there.
        again_NK = (to_NK.unsqueeze(2) == to_NK.unsqueeze(1)).tril(-1).any(dim=-1)
        there = ops.chosen_rows(to_NK.masked_fill(again_NK, self.size), self.size)
        sent_P = there.offsets_E.diff()
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group)
        sent, received = torch.stack((sent_P, received_P)).tolist()
        routing_N2K = torch.cat((expert_ids_NK.float(), weights_NK.float()), dim=1)
        leaving = (ops.gather_rows(t, there)[: sum(sent)] for t in (x_ND, routing_N2K))
        arrived_RD, routing_R2K = _Exchange.apply(received, sent, self.group, *leaving)
        ids_RK, weights_RK = routing_R2K.tensor_split(2, dim=1)
        results_RD = compute(arrived_RD, ids_RK.detach().long(), weights_RK)
        (back_SD,) = _Exchange.apply(sent, received, self.group, results_RD)
        ones_NK = (~again_NK).to(weights_NK.dtype)
        total_ND: Tensor = ops.combine(F.pad(back_SD, (0, 0, 0, 1)), ones_NK, there)
        return total_ND


class DispatchInMemory:
    """Lets the ranks of one machine compute their parts of each other's tokens."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def __call__(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, compute: Compute) -> Tensor:
        """See `Dispatch`."""
        counts: list[int] = []
        x_RD, ids_RK, weights_RK = _Gather.apply(self.memory, counts, x_ND, expert_ids_NK, weights_NK)
        total_ND: Tensor = _Sum.apply(self.memory, counts, compute(x_RD, ids_RK, weights_RK))
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
        self.dispatch: Dispatch = DispatchByMessages(mesh.get_group(), e)
        self.first = e // mesh.size() * mesh.get_local_rank()
        self.gate_up_proj = _shared(torch.empty(e // mesh.size(), 2 * f, d, device=device), mesh)
        self.down_proj = _shared(torch.empty(e // mesh.size(), d, f, device=device), mesh)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D)."""
        return self.dispatch(x_ND, expert_ids_NK, weights_NK, self._own)

    def _own(self, x_RD: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """The weighted sum of this rank's experts."""
        weights = _local(self.gate_up_proj), _local(self.down_proj), self.activation
        options: dict[str, Any] = {"products": self.products, "backend": self.backend}
        return ops.moe_part(x_RD, weights_RK, ids_RK, *weights, self.first, **options)


class _Gather(torch.autograd.Function):
    """The tokens of all ranks with their routing; `counts` becomes how many each rank has."""

    @staticmethod
    def forward(
        ctx: Any, memory: SharedMemory, counts: list[int], x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor
    ) -> tuple[Tensor, ...]:
        counts[:], gathered = memory.gather_rows(x_ND, ids_NK, weights_NK)
        ctx.memory, ctx.counts = memory, counts
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_RD, _, grad_weights_RK = gradients
        grad_x_ND, grad_weights_NK = ctx.memory.sum_rows(ctx.counts, grad_x_RD, grad_weights_RK)
        return None, None, grad_x_ND, None, grad_weights_NK


class _Sum(torch.autograd.Function):
    """This rank's tokens, each the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, memory: SharedMemory, counts: list[int], part_RD: Tensor) -> Tensor:
        ctx.memory = memory
        (total_ND,) = memory.sum_rows(counts, part_RD)
        return total_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        _, (grad_RD,) = ctx.memory.gather_rows(grad_ND)
        return None, None, grad_RD


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


def _shared(own: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()
