"""`compute.precision = "bf16-products"`: matrix products in bf16, everything else of a step in fp32.

Projections, attention, experts and the output head multiply numbers rounded to bf16, forward and backward, and add in
fp32; of attention these are queries, keys, values and probabilities. Weights, gradients, the optimizer, and all that is
no such product stay in fp32: embeddings, norms, softmax, routers, the sums over experts, losses. It pays where bf16 is
multiplied faster, and is refused elsewhere.
"""

from __future__ import annotations

import torch

from olmoe.errors import BackendUnavailableError
from olmoe.model import CausalLM, set_products
from olmoe.runtime import cpu_multiplies_bf16
from olmoe.train.config import BF16_PRODUCTS, ComputeConfig


def check(config: ComputeConfig, device: torch.device) -> None:
    """Raise `BackendUnavailableError` if the device multiplies bf16 no faster than fp32, though it is asked to."""
    if config.precision != BF16_PRODUCTS:
        return
    fits = cpu_multiplies_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    if not fits:
        needed = "AVX512-BF16 or AMX" if device.type == "cpu" else "compute capability 8.0"
        raise BackendUnavailableError(
            f'compute.precision = "{BF16_PRODUCTS}" needs a device that multiplies bf16 ({needed}), which this '
            f'{device.type} lacks or does not let torch use; use "fp32".'
        )


def set_up(model: CausalLM, config: ComputeConfig) -> None:
    """Let a model compute as the configuration says."""
    if config.precision == BF16_PRODUCTS:
        set_products(model, torch.bfloat16)
