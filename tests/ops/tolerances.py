"""How closely every backend must agree with the reference: relative to the largest magnitude, by operation and dtype.

The reference accumulates in fp32 and rounds once, at the end. One rounding of the result is 2^-9 in bf16
and 2^-12 in fp16; the default allows two. Raising a number needs a reason beside it.
"""

import torch

_DEFAULT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Gradients pass through products of two rounded factors.
_GRADIENT = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# Between its two products an expert's gate, up and their product are each stored in the model's dtype, as
# every implementation on half-precision hardware does (transformers' too): three roundings more.
_EXPERTS = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# torch's attention kernels round the probabilities to the model's dtype before the second product.
_ATTENTION = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Exact integers within a block of 32; the sums over blocks and the scales are fp32.
_PACKED = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# For values without a hidden one that rounded to its other neighbour. silu is within 2 units in the last place.
_PACKED_MOE = {torch.float32: 5e-6}
# fp32 inside, whatever the cache holds; the exponential is within 2 units in the last place.
_CACHED_ATTENTION = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

_FORWARD_BY_OPERATION = {
    "experts": _EXPERTS,
    "moe": _EXPERTS,
    "attention": _ATTENTION,
    "packed_linear": _PACKED,
    "packed_moe": _PACKED_MOE,
    "cached_attention": _CACHED_ATTENTION,
}


def forward_tolerance(operation: str, dtype: torch.dtype) -> float:
    return _FORWARD_BY_OPERATION.get(operation, _DEFAULT)[dtype]


def gradient_tolerance(operation: str, dtype: torch.dtype) -> float:
    return _GRADIENT[dtype]
