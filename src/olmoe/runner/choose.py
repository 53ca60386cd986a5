"""Which runner a model gets."""

from __future__ import annotations

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.model import CausalLM
from olmoe.ops.cpu import extension
from olmoe.ops.dispatch import AUTO, PRIORITY
from olmoe.runner.base import Runner, Unfit
from olmoe.runner.cpu_runner import CpuRunner
from olmoe.runner.torch_runner import TorchRunner
from olmoe.runtime import log_once

BACKENDS = (AUTO, *PRIORITY)


def require_backend(backend: str) -> None:
    """Raise unless `backend` is one of auto, cpu, torch and reference, and can run here."""
    if backend not in BACKENDS:
        raise UserError(f"Unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend == "cpu" and (reason := extension.unavailable()) is not None:
        raise BackendUnavailableError(f"Backend 'cpu' cannot run here: {reason}; use the backend torch.")


def make_runner(model: CausalLM, backend: str = AUTO) -> Runner:
    """Compile `model` for its device: for the C++ kernels ("cpu"), for torch ("torch", "reference"), or "auto".

    "auto" takes the kernels if they can compute the model, and logs which runner it chose. Raises `UserError` for an
    unknown backend, and `BackendUnavailableError` if "cpu" cannot compute the model.
    """
    require_backend(backend)
    if backend in (AUTO, "cpu"):
        try:
            runner = CpuRunner(model)
        except Unfit as reason:
            if backend == "cpu":
                raise BackendUnavailableError(
                    f"Backend 'cpu' cannot compute this model: {reason}; use the backend auto or torch."
                ) from None
            log_once(f"inference runs on torch: {reason}")
        else:
            log_once(f"inference runs on the C++ kernels ({extension.isa()})")
            return runner
    return TorchRunner(model, backend)
