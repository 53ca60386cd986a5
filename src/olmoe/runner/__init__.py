"""Inference on a compiled network: a runner is made once from a model, and one call of it takes any mixture of tokens.

`base` defines inputs and outputs, `policy` changes of routing; `cpu_runner` runs on the C++ kernels, and `torch_runner`
runs the plain network on any device; `trace_file` stores what routers chose.
"""

from __future__ import annotations

from olmoe.runner.base import (
    Batch,
    CacheView,
    RouterTrace,
    Runner,
    StepOutput,
    Unfit,
    Want,
    position_bytes,
    to_cache_dtype,
)
from olmoe.runner.choose import BACKENDS, make_runner, require_backend
from olmoe.runner.cpu_runner import CpuRunner
from olmoe.runner.policy import RouterPolicy
from olmoe.runner.torch_runner import TorchRunner
from olmoe.runner.trace_file import Trace, TraceWriter

__all__ = [
    "BACKENDS",
    "Batch",
    "CacheView",
    "CpuRunner",
    "RouterPolicy",
    "RouterTrace",
    "Runner",
    "StepOutput",
    "TorchRunner",
    "Trace",
    "TraceWriter",
    "Unfit",
    "Want",
    "make_runner",
    "position_bytes",
    "require_backend",
    "to_cache_dtype",
]
