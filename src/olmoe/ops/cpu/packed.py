"""The C++ kernels on packed matrices: products with int4 and int8 blocks as stored in memory or in a mapped file.

Activations are quantized to int8 in blocks of 32 on the way (as llama.cpp does for the same formats); sums within a
block are exact integers, sums over blocks fp32.

Shapes legend: N tokens, D hidden, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.ops.cpu.extension import kernels, packed_formats, packed_matrix, unsupported, wide
from olmoe.ops.cpu.functional import run_moe

__all__ = ["packed_embedding", "packed_formats", "packed_linear", "packed_moe", "unsupported"]


def packed_linear(
    x: Tensor, codes: Tensor, format_name: str, rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """x W^T + b for a packed W (rows, columns). x (..., columns) -> (..., rows) in x's dtype."""
    assert x.shape[-1] == columns, (x.shape, columns)
    assert bias is None or bias.shape == (rows,)
    rows_NC = wide(x).view(-1, columns)
    out = torch.empty(len(rows_NC), rows)
    offset = None if bias is None else wide(bias)
    kernels().linear(
        packed_matrix(codes, format_name, rows, columns),
        rows_NC.data_ptr(),
        len(rows_NC),
        0 if offset is None else offset.data_ptr(),
        out.data_ptr(),
    )
    return out.view(*x.shape[:-1], rows).to(x.dtype)


def packed_moe(
    x: Tensor,
    weights_NK: Tensor,
    expert_ids_NK: Tensor,
    gate_up: tuple[Tensor, str],
    down: tuple[Tensor, str],
    width: int,
) -> Tensor:
    """`ops.moe` with silu for stacks of packed experts, each (codes (E, G, bytes), format). x (N, D) -> (N, D)."""
    n, d = x.shape
    count = gate_up[0].shape[0]
    assert down[0].shape[0] == count
    out = torch.empty(n, d)
    run_moe(
        packed_matrix(*gate_up, 2 * width, d),
        packed_matrix(*down, d, width),
        count,
        width,
        x,
        weights_NK,
        expert_ids_NK,
        out,
    )
    return out.to(x.dtype)


def packed_embedding(ids: Tensor, codes: Tensor, format_name: str, rows: int, columns: int) -> Tensor:
    """Rows of a packed matrix. ids (...) -> (..., columns) fp32. Raises `IndexError` for ids that it lacks."""
    flat = ids.long().contiguous().view(-1)
    out = torch.empty(len(flat), columns)
    if len(flat):
        low, high = torch.aminmax(flat)
        if int(low) < 0 or int(high) >= rows:
            raise IndexError(f"ids from {int(low)} to {int(high)} are not all below {rows}")
        kernels().embed(packed_matrix(codes, format_name, rows, columns), flat.data_ptr(), len(flat), out.data_ptr())
    return out.view(*ids.shape, columns)
