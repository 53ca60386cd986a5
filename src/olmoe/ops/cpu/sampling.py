"""`sample` of the backend "cpu": the choice of the next token by the C++ kernels, for all rows in one call."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from olmoe.ops.cpu.extension import kernels, unsupported, wide
from olmoe.ops.dispatch import register
from olmoe.ops.types import Samples, SamplingRow


@register("sample", "cpu", lambda logits, rows, allowed: unsupported(logits, *(row.mask for row in rows)))
def sample(logits: Tensor, rows: list[SamplingRow], allowed: int) -> Samples:
    """See `ops.sample`."""
    samples = Samples.room(rows, allowed)
    rows_BV, module = wide(logits), kernels()
    prepared = [_prepared(module.SamplingRow, row, allowed) for row in rows]
    module.sample(
        rows_BV.data_ptr(),
        rows_BV.shape[1],
        allowed,
        prepared,
        samples.ids.data_ptr(),
        samples.status.data_ptr(),
        samples.logprobs.data_ptr(),
        samples.top_ids.data_ptr(),
        samples.top_logprobs.data_ptr(),
        samples.top_ids.shape[1],
    )
    return samples


def _address(numbers: array[int] | array[float], typecode: str) -> int:
    assert numbers.typecode == typecode, numbers.typecode
    return numbers.buffer_info()[0]


def _prepared(make: type, row: SamplingRow, allowed: int) -> object:
    """`row` for the kernels, which read its arrays and its mask in place."""
    mask = row.mask
    assert mask is None or (mask.dtype == torch.int32 and mask.is_contiguous())
    prompt_length, length = row.prompt_length, len(row.ids)
    assert 0 <= prompt_length <= length
    return make(
        row.temperature,
        min(row.top_k, allowed),
        row.top_p,
        row.min_p,
        row.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
        row.seed,
        row.position,
        -1 if row.logprobs is None else min(row.logprobs, allowed),
        _address(row.ids, "q"),
        prompt_length,
        length,
        _address(row.bias_ids, "q"),
        _address(row.biases, "d"),
        len(row.biases),
        0 if mask is None else mask.data_ptr(),
    )
