"""A network's initial weights: filled as in OLMoE's training, or memory for a loader to fill.

Making a network without values takes some tricks, so that loading imports neither torch's compiler nor sympy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from olmoe.config import ModelConfig
from olmoe.model.network import CausalLM, Linear, RMSNorm
from olmoe.runtime import advise_large_pages


def initialize(model: CausalLM, seed: int, assign: Callable[[nn.Parameter, Tensor], None] | None = None) -> None:
    """Fill the weights as in OLMoE's training: every matrix truncated normal (3 sigma), norms 1, biases 0.

    The standard deviation is `config.initializer_range`, without depth or embedding scaling (the training
    code has `init_fn: normal, init_std: 0.02, init_cutoff_factor: 3`). `assign` copies each whole matrix into its
    parameter, if that is elsewhere or only partly here.
    """
    std = model.config.initializer_range
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            values = parameter if assign is None else torch.empty(parameter.shape)
            nn.init.trunc_normal_(values, 0.0, std, -3 * std, 3 * std, generator=generator)
            if assign is not None:
                assign(parameter, values)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def without_values(config: ModelConfig) -> CausalLM:
    """The network on the meta device, for loaders that fill in all values."""
    with torch.device("meta"), _NoInitialization():
        return CausalLM(config)


class _NoInitialization(TorchFunctionMode):
    """Skips `torch.nn.init`, whose first call on the meta device imports torch's compiler, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def allocate(model: CausalLM, device: torch.device | str) -> CausalLM:
    """Give the parameters of `without_values` memory on `device`, its values not set.

    The same as `Module.to_empty`, which imports sympy for meta tensors and so takes a second longer.
    """

    def allocated(t: Tensor) -> Tensor:
        memory = torch.empty(t.shape, dtype=t.dtype, device=device)
        if memory.device.type == "cpu":
            advise_large_pages(memory.data_ptr(), memory.numel() * memory.element_size())
        return memory

    return model._apply(allocated)
