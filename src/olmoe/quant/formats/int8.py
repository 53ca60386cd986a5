"""Int8 by rows: each row of a matrix is scaled by its largest magnitude, the vector-wise scheme of LLM.int8 weights.

    w ~ q * absmax / 127      q in -127..127, absmax in fp32, one per row

It stores 8 bits per weight and one scale per output. LLM.int8 (arXiv 2208.07339) also quantizes activations, and
multiplies their outlier columns in half precision because int8 would lose them. Here activations are never
quantized: all of them, outliers included, are multiplied with decoded weights in the compute dtype.

Shapes legend: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.quant.formats.base import CODES, Format

# Keeps the reciprocal of an all-zero row's scale finite.
_TINY = 1e-38
# Weights decoded at a time on a CPU: 128 k in fp32 are 512 KB, which stay in the L2 cache.
DECODE_WEIGHTS = 2**17


class Int8(Format):
    """Row-wise absmax int8."""

    name = "int8"
    bits = 8
    skips_modules = True

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Format.parts`."""
        return {CODES: ((rows, columns), torch.int8), "absmax": ((rows,), torch.float32)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """See `Format.encode`."""
        wide = weight.detach().float()
        absmax_R = wide.abs().amax(dim=1)
        codes = (wide * (127.0 / absmax_R.clamp(min=_TINY)).unsqueeze(1)).round_()
        return {CODES: codes.to(torch.int8), "absmax": absmax_R}

    def decode(self, parts: dict[str, Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """See `Format.decode`."""
        codes, scale_R = parts[CODES], parts["absmax"] / 127.0
        out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
        step = max(DECODE_WEIGHTS // max(columns, 1), 1) if codes.device.type == "cpu" else max(rows, 1)
        for start in range(0, rows, step):
            here = slice(start, start + step)
            out[here] = codes[here].float().mul_(scale_R[here].unsqueeze(1))
        return out
