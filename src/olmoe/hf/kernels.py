"""The choice of backend for a model of the transformers face.

Nothing has to be switched on: its decoder layers (`olmoe.hf.kernel_layer`) use the C++ kernels when a model
runs without gradients on a CPU, and are plain ones for training, adapters, hooks, parallelism and compiled graphs.
"""

from __future__ import annotations

from torch import nn

from olmoe.errors import BackendUnavailableError
from olmoe.model import set_backend
from olmoe.ops import AUTO
from olmoe.runner import require_backend


class KernelBackend:
    """Mixed into our pre-trained classes: the choice of the backend of their operations."""

    _kernel_backend = AUTO

    @property
    def kernel_backend(self) -> str:
        """The choice of `set_kernel_backend`; "auto" by default."""
        return self._kernel_backend

    def set_kernel_backend(self, backend: str) -> None:
        """Compute by "auto" (C++ kernels where they fit, else torch), "cpu" (those kernels), "torch" or "reference".

        A name is taken literally, so "cpu" cannot train. The choice belongs to this object and is not saved. Raises
        `UserError` for other names and `BackendUnavailableError` if "cpu" cannot run: without the compiled kernels, or
        on another device.
        """
        assert isinstance(self, nn.Module)
        require_backend(backend)
        if backend == "cpu":
            elsewhere = {p.device.type for p in self.parameters()} - {"cpu"}
            if elsewhere:
                raise BackendUnavailableError(
                    f"Backend 'cpu' runs on the CPU, but the model is on {' and '.join(sorted(elsewhere))}; move it "
                    "there first, or use auto."
                )
        set_backend(self, backend)
        self._kernel_backend = backend
