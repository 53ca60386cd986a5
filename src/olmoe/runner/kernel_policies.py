"""Router policies as the C++ kernels read them: addresses of arrays, which must live as long as they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from olmoe.ops.cpu import extension
from olmoe.runner.policy import ResolvedPolicy, stack_policies


class KernelPolicies:
    """Several policies for one model, and which of them each token has: `kernel` is what the kernels take.

    `largest` is the largest number of experts that a token may choose, `shape` is (layers, experts).
    """

    def __init__(
        self, policies: Sequence[ResolvedPolicy], top_k: int = 0, of_token: Sequence[int] | None = None
    ) -> None:
        """`of_token` has indices into `policies`, or -1 for a token without a policy, which chooses `top_k` experts.

        None means that all tokens have the one policy.
        """
        bias, chosen, renormalize, pinned, temperature = stack_policies(policies)
        assert of_token is not None or len(policies) == 1
        self.shape: tuple[int, ...] = bias.shape[1:]
        self.largest = max(top_k, int(chosen.max()))
        numbers = None if of_token is None else np.array(of_token, dtype=np.int32)
        self._arrays = (bias, chosen, renormalize, numbers, pinned, temperature)
        addresses = (0 if array is None else array.ctypes.data for array in self._arrays)
        self.kernel: Any = extension.kernels().Policies(*addresses, bias.shape[1], self.largest)
