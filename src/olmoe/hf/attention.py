"""`attend` over a transformers cache and attention implementation, and RoPE angles by transformers' rules.

Shapes legend: B batch, T sequence, S cached sequence, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from olmoe.fused import STEP_ROWS, all_layers
from olmoe.hf.cache_name import is_paged, updated
from olmoe.hf.config import OlmoeConfig
from olmoe.hf.growing_cache import GrowingLayer, growing_layer
from olmoe.model import Attention, DecoderLayer, RouterOutput
from olmoe.ops import AUTO
from olmoe.ops.autocast import autocast_dtype
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import CachedTokens
from olmoe.ops.transforms import plain_attention, twice_differentiable


class RotaryEmbedding(nn.Module):
    """Angles for every kind of RoPE that transformers knows (default, linear, dynamic, yarn, llama3, ...).

    Like transformers' classes it keeps `inv_freq`, which dynamic kinds replace as sequences grow; cosines
    and sines stay in fp32, one value a pair of channels.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.compute(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def compute(self, config: OlmoeConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies (Dh/2,) and the factor on cosines and sines, before any sequence is seen."""
        if self.rope_type != "default":
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config, device)
            return inv_freq, scaling
        width = config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    @property
    def rope_init_fn(self) -> Any:
        """What transformers' dynamic update calls to recompute the frequencies."""
        return ROPE_INIT_FUNCTIONS[self.rope_type]

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) -> cos, sin (B or 1, T, Dh/2) in fp32. `x` names the device."""
        angle = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def prepare(layers: nn.ModuleList, config: OlmoeConfig) -> None:
    """Give each attention module what transformers' attention implementations look for on it."""
    for index, layer in enumerate(layers):
        assert isinstance(layer, DecoderLayer)
        attention: Any = layer.self_attn
        attention.config, attention.layer_idx, attention.is_causal = config, index, True
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        attention.scaling = attention.head_dim**-0.5


class CachedAttend:
    """`attend` of one forward pass. `weights` collects attention probabilities where the implementation has them."""

    def __init__(
        self, config: OlmoeConfig, layers: nn.ModuleList, mask: Any, cache: Cache | None, options: dict[str, Any]
    ) -> None:
        self._layers, self._mask, self._cache, self._options = layers, mask, cache, options
        self._dropout, self._implementation = config.attention_dropout, config._attn_implementation
        # Masks and further options are for transformers to follow.
        self._plain = config._attn_implementation == "sdpa" and mask is None and not options
        self._function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
        self.weights: list[Tensor | None] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (B, T, H, Dh), k and v (B, T, G, Dh) -> (B, T, H, Dh)."""
        module: Any = self._layers[layer].self_attn
        if self._plain and (out := self._kernels(module, q, k, v, layer)) is not None:
            self.weights.append(None)
            return out
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # heads first
        options = self._options
        if self._cache is not None:
            k, v, options = updated(self._cache, k, v, layer, options)
        out, weights = self._attended(module, q, k, v, options)
        self.weights.append(weights)
        return out

    def _attended(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """transformers' attention: q (B, H, T, Dh), k and v (B, G, S, Dh) -> (B, T, H, Dh), and its probabilities."""
        dropout = self._dropout if module.training else 0.0
        options = {"dropout": dropout, "scaling": module.scaling, **options}
        if self._implementation != "sdpa" or dropout or is_paged(self._cache):
            attended: tuple[Tensor, Tensor | None] = self._function(module, q, k, v, self._mask, **options)
            return attended
        lower = autocast_dtype(q)
        if lower is not None:  # torch would, and keep both
            q, k, v = (t.to(lower) for t in (q, k, v))
        fused = functools.partial(_output, self._function, module, self._mask, options)
        plain = functools.partial(_plain_output, fused)
        return twice_differentiable(fused, plain, q, k, v), None

    def step(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kind: type[DecoderLayer]
    ) -> tuple[Tensor, Sequence[RouterOutput]] | None:
        """One new token of each sequence through all layers, of type `kind`, in one call of the C++ kernels.

        x (B, 1, D) -> (B, 1, D) and what each router decided; None, and nothing done, where they do not fit.
        """
        batch, count = x.shape[:2]
        if (
            not self._plain
            or count > 1
            or batch > STEP_ROWS
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return None
        caches: list[GrowingLayer] = []

        def reserve() -> list[CachedTokens] | None:
            rooms: list[CachedTokens] = []
            for index, layer in enumerate(self._layers):
                module: Any = layer.self_attn
                cache = self._growing(module, index)
                kv_heads = module.k_norm.weight.shape[0] // module.head_dim
                room = None if cache is None else cache.room(batch, kv_heads, module.head_dim, x.dtype)
                if cache is None or room is None or (rooms and not room.like(rooms[0])):
                    return None
                caches.append(cache)
                rooms.append(room)
            return rooms

        whole = all_layers(list(self._layers), kind, x, rope, reserve)
        if whole is not None:
            for cache in caches:
                cache.filled()
            self.weights = [None] * len(caches)
        return whole

    def _growing(self, module: Any, layer: int) -> GrowingLayer | None:
        """The layer of the cache that the kernels may extend; None where attention is not what they compute."""
        cache = growing_layer(self._cache, layer)  # also where attention is not computed here
        if module.scaling != module.head_dim**-0.5 or (module.training and self._dropout):
            return None
        return cache

    def _kernels(self, module: Any, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor | None:
        """A whole prompt, or one new token, by the C++ kernels; None where they do not fit."""
        if module.backend not in (AUTO, "cpu") or extension.unsupported(q, k, v) is not None or torch.is_grad_enabled():
            return None
        cache = self._growing(module, layer)
        if cache is None:
            return None
        if q.shape[1] > 1 and (cache.get_seq_length() or not module.is_causal):
            return None
        return cache.attend(q, k, v)


def _output(function: Any, module: Any, mask: Any, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What an attention function without probabilities gives.

    Not a method: the graph of a forward pass keeps it, and must not keep the cache, whose keys keep the graph.
    """
    out: Tensor = function(module, q, k, v, mask, **options)[0]
    return out


def _plain_output(fused: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with plain_attention():
        return fused(*inputs)


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention that also returns its probabilities (B, H, T, S). The mask is added to the scores."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) if group > 1 else t for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities
