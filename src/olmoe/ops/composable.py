"""The mixture's operations in plain tensor code, for transforms that must follow each step: see `transforms`.

They allocate more than `torch_fast` does, so they are used only there. Under `vmap`, control flow must not
depend on values, such as how many rows an expert has: then every expert computes every token, and the chosen results
are selected.

Shapes legend: N tokens, D hidden, E experts, K experts per token, M = N*K routed rows, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.ops.reference import Activation
from olmoe.ops.transforms import mapped
from olmoe.ops.types import SortedRows


def sort_by_expert(expert_ids_NK: Tensor, num_experts: int) -> SortedRows:
    """See `reference.sort_by_expert`; nothing is written in place."""
    n, k = expert_ids_NK.shape
    sorted_M, order_M = torch.sort(expert_ids_NK.reshape(-1), stable=True)
    boundaries_E = torch.arange(num_experts + 1, device=expert_ids_NK.device)
    offsets_E = (sorted_M < boundaries_E.unsqueeze(1)).sum(dim=1)
    return SortedRows(order_M, order_M // k, order_M.argsort().view(n, k), offsets_E)


def experts(rows_MD: Tensor, offsets_E: Tensor, gate_up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    """See `reference.experts`; in the dtype of the rows."""
    if mapped(offsets_E):
        places_M = torch.arange(rows_MD.shape[0], device=rows_MD.device)
        ids_M1 = (places_M.unsqueeze(1) >= offsets_E[1:]).sum(dim=1, keepdim=True)
        return moe(rows_MD, rows_MD.new_ones(ids_M1.shape), ids_M1, gate_up, down, activation)
    outputs = []
    # Weights are unbound once: indexing each expert would make a gradient of the whole stack every time.
    stack = zip(rows_MD.split(offsets_E.diff().tolist()), gate_up.unbind(), down.unbind(), strict=True)
    for x, gate_up_2FD, down_DF in stack:
        gate, up = (x @ gate_up_2FD.T).chunk(2, dim=-1)
        outputs.append((activation(gate) * up) @ down_DF.T)
    return torch.cat(outputs)


def moe(
    x: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, gate_up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """See `ops.moe`; all experts on all tokens."""
    gate, up = torch.matmul(x, gate_up.to(x.dtype).transpose(1, 2)).chunk(2, dim=-1)  # (E, N, F)
    all_NED = torch.matmul(activation(gate) * up, down.to(x.dtype).transpose(1, 2)).transpose(0, 1)
    ids_NKD = expert_ids_NK.long().unsqueeze(-1).expand(*expert_ids_NK.shape, x.shape[-1])
    return (all_NED.gather(1, ids_NKD).float() * weights_NK.float().unsqueeze(-1)).sum(dim=1).to(x.dtype)


def sum_rows(rows_MD: Tensor, position_NK: Tensor) -> Tensor:
    """The sum of each token's rows in the order of k: the gradient of `gather_rows`. (M, D) -> (N, D)."""
    return rows_MD[position_NK].float().sum(dim=1).to(rows_MD.dtype)


def combine_gradients(
    grad_ND: Tensor, rows_MD: Tensor, weights_NK: Tensor, position_NK: Tensor, order_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `combine` for its rows and weights."""
    grad_MD = grad_ND.float()[order_M // weights_NK.shape[1]]
    grad_weights_M = (grad_MD * rows_MD.float()).sum(dim=-1)
    weights_M = weights_NK.float().flatten()[order_M]
    grad_rows_MD = grad_MD * weights_M.unsqueeze(1)
    return grad_rows_MD.to(rows_MD.dtype), grad_weights_M[position_NK].to(weights_NK.dtype)


def gated_unit_gradient(grad_MF: Tensor, gate_up_M2F: Tensor, activation: Activation) -> Tensor:
    """The gradient of act(gate) * up."""
    again = torch.is_grad_enabled() and gate_up_M2F.requires_grad
    x = gate_up_M2F if again else gate_up_M2F.detach().requires_grad_()
    with torch.enable_grad():
        gate, up = x.chunk(2, dim=-1)
        out = activation(gate) * up
    return torch.autograd.grad(out, x, grad_MF, create_graph=torch.is_grad_enabled())[0]
