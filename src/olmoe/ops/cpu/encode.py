"""The C++ kernels that choose codes for 4- and 5-bit blocks: the arithmetic of `olmoe.quant.search`, bit for bit.

Shapes legend: R rows, C columns, G = R/16 groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.ops.cpu.extension import float_matrix, kernels, packed_formats, packed_shape, unsupported_weight

FORMATS = ("q4_0", "q5_0")


def unsupported(format_name: str, weight: Tensor, factor: Tensor | None) -> str | None:
    """Why `encode` cannot take these arguments, or None."""
    if format_name not in FORMATS:
        return f"it chooses no codes for {format_name}"
    if (reason := unsupported_weight(weight)) is not None:
        return reason
    # When it compensates, torch computes a matrix's last rows differently if they do not fill a vector.
    if weight.shape[0] % (16 if factor is None else 32):
        return f"{weight.shape[0]} rows fill no whole groups"
    if factor is not None and not (factor.dtype == torch.float32 and factor.is_contiguous() and factor.is_cpu):
        return "the factor is not contiguous fp32 in memory"
    if factor is not None and not kernels().compensates():
        return "this CPU does not multiply and add at once"
    return None


def encode(format_name: str, weight: Tensor, factor: Tensor | None) -> Tensor:
    """A matrix (R, C) stored with chosen codes, (G, bytes) uint8, for arguments that are not `unsupported`.

    With `factor` (C, C), upper triangular, columns are compensated, otherwise only scales are searched. The caller must
    check that scales are finite.
    """
    rows, columns = weight.shape
    assert columns % 32 == 0, columns
    assert factor is None or factor.shape == (columns, columns), factor.shape
    out = torch.empty(packed_shape(format_name, rows, columns), dtype=torch.uint8)
    address = 0 if factor is None else factor.data_ptr()
    kernels().encode(float_matrix(weight.detach()), address, packed_formats()[format_name][0], out.data_ptr())
    return out
