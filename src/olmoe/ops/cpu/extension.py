"""The compiled module `_kernels`: loaded once, with its instruction set, threads and pointers.

It takes addresses and checks nothing, so all its inputs must pass the checks of this package.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.ops.transforms import observed, only_checkpointed, transformed
from olmoe.runtime import log

# `Type` of csrc/core/traits.h.
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_TYPES = FLOAT_TYPES | {torch.int8: 6}
# Subclasses (distributed, quantized, fake tensors) keep their values elsewhere.
_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The module, or the reason why there is none."""
    try:
        _kernels = importlib.import_module("olmoe.ops.cpu._kernels")
    except ImportError as error:
        reason = f"the C++ kernels are not installed ({error})"
        log.warning("%s; inference runs on torch. Install a C++20 compiler and reinstall olmoe for more speed.", reason)
        return None, reason
    return _kernels, None


def available() -> bool:
    """Whether the compiled kernels are installed."""
    return _load()[0] is not None


def unavailable() -> str | None:
    """Why the compiled kernels are not installed; None if they are."""
    return _load()[1]


def kernels() -> Any:
    """The compiled module, with as many threads as torch has. Raises `BackendUnavailableError` without it."""
    module, reason = _load()
    if module is None:
        raise BackendUnavailableError(f"Backend 'cpu' cannot run here: {reason}; use the backend torch.")
    threads = torch.get_num_threads()
    if module.get_threads() != threads:
        module.set_threads(threads)
    return module


def packed_formats() -> dict[str, tuple[int, int]]:
    """Block formats that the kernels support: name -> `Type`, and bytes of a row's block. Empty without kernels."""
    module, _ = _load()
    formats: dict[str, tuple[int, int]] = {} if module is None else module.packed_formats
    return formats


def packed_shape(format_name: str, rows: int, columns: int) -> tuple[int, int]:
    """The shape (G, bytes) of a matrix that is stored in blocks."""
    group, block = kernels().block_shape
    assert columns % block == 0
    return -(-rows // group), columns // block * group * packed_formats()[format_name][1]


def isas() -> tuple[str, ...]:
    """The instruction sets that the kernels have for this machine, best first; the last is "scalar"."""
    return tuple(kernels().isas())


def isa() -> str:
    """The instruction set in use."""
    return str(kernels().isa())


def set_isa(name: str) -> None:
    """Use the kernels of that instruction set, for tests and comparisons. Raises `UserError` for others."""
    if not kernels().set_isa(name):
        raise UserError(f"Instruction set {name!r} is not available here; choose one of {', '.join(isas())}.")


def unsupported(x: Tensor, *others: Tensor | None, gradients: bool = False) -> str | None:
    """Why the kernels cannot take `x` and `others` as inputs, or None; only those of training compute `gradients`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "it cannot be traced"
    if transformed(x, *others):
        return "transforms of torch.func and forward-mode derivatives cannot follow it"
    if observed() and not (gradients and only_checkpointed()):
        return "a mode is active that must see every operation"
    for t in (x, *others):
        if t is None:
            continue
        if type(t) not in _PLAIN:
            return f"tensors of type {type(t).__name__} have no memory that kernels can read"
        if not t.is_cpu:
            return f"it runs on CPU tensors, not on {t.device}"
        if not gradients and t.requires_grad and torch.is_grad_enabled():
            return "it computes no gradients"
        if t.dtype not in FLOAT_TYPES and t.is_floating_point():
            return f"it does not support {t.dtype}"
    return unavailable()


def unsupported_weight(weight: Tensor) -> str | None:
    """Why the kernels cannot read `weight` in place, or None."""
    reason = unsupported(weight)
    if reason is None and weight.dtype not in FLOAT_TYPES:
        reason = f"it does not support weights of {weight.dtype}"
    if reason is None and weight.numel() == 0:
        reason = "the weight is empty"
    return "the weight is not contiguous" if reason is None and not weight.is_contiguous() else reason


def wide(x: Tensor) -> Tensor:
    """`x` as contiguous fp32, itself if it is."""
    return x.detach().float().contiguous()


def float_matrix(weight: Tensor, inputs: torch.dtype = torch.float32) -> Any:
    """A contiguous matrix (R, C), or a stack (E, R, C), for the kernels. The caller keeps `weight` alive.

    `inputs` is the dtype of what it is multiplied with. With bf16 weights, bf16 inputs and what the kernels compute
    between the products of a call stay in bf16 if the CPU has an instruction for it; fp32 inputs are never rounded.
    """
    rows, columns = weight.shape[-2:]
    assert weight.is_contiguous()
    assert weight.device.type == "cpu", weight.device
    stride = rows * columns * weight.element_size()
    both_bf16 = weight.dtype == inputs == torch.bfloat16
    return kernels().Matrix(weight.data_ptr(), FLOAT_TYPES[weight.dtype], rows, columns, stride, both_bf16)


def packed_matrix(codes: Tensor, format_name: str, rows: int, columns: int) -> Any:
    """A matrix of blocks, codes (G, bytes) uint8 or a stack (E, G, bytes), laid out by `olmoe.quant.formats.blocks`."""
    shape = packed_shape(format_name, rows, columns)
    assert codes.shape[-2:] == shape, (codes.shape, shape)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    assert codes.device.type == "cpu", codes.device
    return kernels().Matrix(
        codes.data_ptr(), packed_formats()[format_name][0], rows, columns, shape[0] * shape[1], False
    )
