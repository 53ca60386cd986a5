"""Better codes and scales for the same blocks: reference quantizers just round, these are chosen by their effect.

Rounding a matrix W to Q changes a layer's output x W^T. With H = E[x x^T] of its inputs, the expected squared change
is the sum over rows of (w - q) H (w - q)^T.

- `search` uses only the diagonal of H, the importance of each column: for every block it tries several scales,
  rounds, and keeps the scale whose least-squares fit leaves the smallest weighted error.
- `compensate` uses all of H: columns are rounded from left to right, and the error of each is compensated by the
  columns that are still free (the method of GPTQ, arXiv 2210.17323, here with a scale search in each
  block of 32 columns).

Both exist in torch, here, and in C++ (csrc/isa/common/encode.h), with the same arithmetic in the same order: a change
to one must be made to the other.

Shapes legend: R rows, C columns, N blocks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from olmoe.ops.cpu import encode as kernels
from olmoe.quant.formats.blocks import BLOCK, GROUP, PART_WEIGHTS, BlockFormat, extreme

# Where the extreme value of a block may land, as a share of the grid's lower end (-8 for q4_0, -16 for q5_0): on either
# end, slightly inside, or beyond.
TARGETS = tuple(step / 8 for step in (8.6, 8.3, 8.0, 7.7, 7.4, 7.1, 6.8, -6.4, -6.7, -7.0, -7.3, -7.6))
REFINEMENTS = 2
# Damping of all columns, as a share of the mean variance: calibration text is short, and not the text that the model
# will be used on.
DAMPING = 0.3
TINY = 1e-12
# Weights of whole rows compensated at a time: 16 M in fp32 are 64 MB, and an output head has six times as many.
COMPENSATED = 2**24


def search(format: BlockFormat, blocks: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, 32) uint8 and scales (N,) fp16 with the least weighted error.

    blocks (N, 32) fp32, importance of the same shape or one that broadcasts to it.
    Formats that gain nothing from it (q8_0) are rounded.
    """
    if not format.searched:
        return format.quantize(blocks)
    top = extreme(blocks)
    inverse_top = torch.where(top == 0, 0.0, 1.0 / top)
    weighted = importance * blocks
    best = torch.full_like(top, -1.0)
    scales = torch.zeros_like(top)
    for target in TARGETS:
        q = (
            (blocks * (inverse_top * (-format.zero * target)).unsqueeze(1))
            .round_()
            .clamp_(-format.zero, format.zero - 1)
        )
        scale, gain = _fit(q, weighted, importance)
        better = gain > best
        best = torch.where(better, gain, best)
        scales = torch.where(better, scale, scales)
    for _ in range(REFINEMENTS):
        q = format.round(blocks, scales).float().sub_(format.zero)
        scales, _ = _fit(q, weighted, importance)
    rounded = scales.half()
    return format.round(blocks, rounded), rounded


def _fit(q: Tensor, weighted: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale for integers q (N, 32), and how much it lowers the error compared to all zeros."""
    dot = torch.linalg.vecdot(weighted, q)
    norm = torch.linalg.vecdot(importance * q, q)
    scale = torch.where(norm > 0, dot / norm, 0.0)
    return scale, scale * dot


class Inputs:
    """Statistics of the inputs of matrices: their covariance, which is factored once for all matrices that share it."""

    def __init__(self, covariance: Tensor) -> None:
        self._covariance = covariance

    @functools.cached_property
    def factor(self) -> Tensor:
        """`inverse_factor` of the covariance, contiguous."""
        return inverse_factor(self._covariance).contiguous()


def encode(format: BlockFormat, weight: Tensor, inputs: Inputs | Tensor | None) -> Tensor:
    """A matrix (R, C) stored with chosen codes, (G, bytes) uint8: by `compensate`, or by `search` without inputs.

    `inputs` may be a covariance (C, C) for this matrix alone.
    """
    if inputs is None or not format.searched:
        factor = None
    else:
        factor = (Inputs(inputs) if isinstance(inputs, Tensor) else inputs).factor
    if kernels.unsupported(format.name, weight, factor) is None:
        packed = kernels.encode(format.name, weight, factor)
        format.check_scales(format.scales_of(packed))
        return packed
    rows, columns = weight.shape
    weights = PART_WEIGHTS if factor is None else COMPENSATED
    parts, step = [], max(weights // columns // GROUP, 1) * GROUP
    for start in range(0, rows, step):
        rows_here = weight[start : start + step]
        if factor is None:
            chosen = search(format, rows_here.float().reshape(-1, BLOCK), torch.ones(()))
        else:
            chosen = compensate(format, rows_here, factor)
        parts.append(format.pack(*chosen, len(rows_here)))
    return torch.cat(parts)


def inverse_factor(covariance: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H + DAMPING * mean(diag H) * I. (C, C) fp32 -> (C, C)."""
    damped = covariance.clone()
    diagonal = damped.diagonal()
    diagonal += (DAMPING * diagonal.mean()).clamp(min=TINY)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def compensate(format: BlockFormat, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R*B, 32) uint8 and scales (R*B,) fp16 by GPTQ. weight (R, C), `factor` from `inverse_factor`.

    With U the factor, rounding column c by e changes the optimal remaining columns by -e u_c,(c+1...) / u_cc, and
    e^2 / u_cc^2 is the error that no later column can compensate; it weighs the scale search.
    """
    w_CR = weight.float().T.contiguous()  # the loop runs over columns, so they are made contiguous
    columns, rows = w_CR.shape
    codes = torch.empty(rows, columns // BLOCK, BLOCK, dtype=torch.uint8)
    scales = torch.empty(rows, columns // BLOCK, dtype=torch.float16)
    for b, start in enumerate(range(0, columns, BLOCK)):
        end = start + BLOCK
        block, u = w_CR[start:end], factor[start:end, start:end]
        _, scale = search(format, block.T.contiguous(), u.diagonal().square().reciprocal())
        wide = scale.float()
        inverse = torch.where(wide == 0, 0.0, 1.0 / wide)
        errors, chosen = torch.empty_like(block), torch.empty_like(block)
        for c in range(BLOCK):
            torch.mul(block[c], inverse, out=chosen[c]).round_().clamp_(-format.zero, format.zero - 1)
            torch.sub(block[c], chosen[c] * wide, out=errors[c]).div_(u[c, c])
            block[c + 1 :].addr_(u[c, c + 1 :], errors[c], alpha=-1)
        codes[:, b], scales[:, b] = (chosen.T + format.zero).to(torch.uint8), scale
        w_CR[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes.view(-1, BLOCK), scales.view(-1)
