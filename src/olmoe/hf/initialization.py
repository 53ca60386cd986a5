"""How new weights of our models are initialised: as in OLMoE's training."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import initialization as init

from olmoe.hf.attention import OlmoeRotaryEmbedding
from olmoe.model import Experts, RMSNorm, Router
from olmoe.runtime import no_grad


class Initialization:
    """Mixed into our pre-trained classes: what transformers calls for each module without loaded weights."""

    config: Any

    @no_grad
    def _init_weights(self, module: Any) -> None:
        """OLMoE's initialisation: matrices truncated normal at 3 sigma, norms 1, biases 0."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            init.trunc_normal_(module.weight, 0.0, std, -3 * std, 3 * std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
            padding = getattr(module, "padding_idx", None)
            if padding is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[padding])
        elif isinstance(module, Experts):
            init.trunc_normal_(module.gate_up_proj, 0.0, std, -3 * std, 3 * std)
            init.trunc_normal_(module.down_proj, 0.0, std, -3 * std, 3 * std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, OlmoeRotaryEmbedding):
            inv_freq, _ = module.compute(self.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)
