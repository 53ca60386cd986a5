"""Attention behind transformers' signature, with its caches, masks, implementations and rules for RoPE.

Shapes legend: B batch, T sequence, S cached sequence, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from olmoe.hf.cache_name import is_paged, one_cache, updated
from olmoe.hf.config import FromConfig, OlmoeConfig
from olmoe.hf.growing_cache import GrowingLayer, growing_layer
from olmoe.hf.kernel_step import STEP_ROWS, all_layers
from olmoe.model import Attention, DecoderLayer, RMSNorm, RouterOutput
from olmoe.ops import AUTO
from olmoe.ops.autocast import autocast_dtype
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import CachedTokens
from olmoe.ops.transforms import plain_attention, twice_differentiable
from olmoe.runtime import no_grad

# Options that transformers passes to attention functions at every call, and that the kernels do not need.
_ORDINARY = frozenset(("position_ids", "use_cache"))


class OlmoeRMSNorm(RMSNorm):
    """The network's norm under transformers' names."""

    computes_as = RMSNorm

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)

    @property
    def variance_epsilon(self) -> float:
        """The epsilon that is added to the mean square."""
        return self.eps

    @variance_epsilon.setter
    def variance_epsilon(self, value: float) -> None:
        self.eps = value

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., D) -> (..., D)."""
        return super().forward(hidden_states)

    def extra_repr(self) -> str:
        """Shape and epsilon, for printed models."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class OlmoeRotaryEmbedding(nn.Module):
    """Angles for every kind of RoPE that transformers knows (default, linear, dynamic, yarn, llama3, ...).

    Like transformers' classes it keeps `inv_freq`, which dynamic kinds replace as sequences grow, and repeats each
    value for both halves of the channels; cosines and sines stay in fp32.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self.compute(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: OlmoeConfig, **unused: Any) -> tuple[Tensor, float]:
        """Inverse frequencies (Dh/2,) of RoPE without scaling, and the factor 1."""
        width = config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    def compute(self, config: OlmoeConfig) -> tuple[Tensor, float]:
        """Inverse frequencies (Dh/2,) and the factor for cosines and sines, before any sequence is seen."""
        if self.rope_type == "default":
            return self.compute_default_rope_parameters(config)
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](config)
        return inv_freq, scaling

    @no_grad
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids (B or 1, T) -> cos, sin (B or 1, T, Dh) in fp32. `x` names the device."""
        angle = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rope_of(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """transformers' cos, sin (..., Dh), each value for both halves of the channels -> the network's (..., Dh/2)."""
    cos, sin = position_embeddings
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


class OlmoeAttention(Attention):
    """The network's attention under transformers' signature, over its caches and attention implementations.

    Its settings are read at every call, from where transformers' own class reads them.
    """

    computes_as = Attention
    attention_dropout = FromConfig()

    def __init__(self, config: OlmoeConfig, layer_idx: int | None = None) -> None:
        super().__init__(OlmoeConfig.network(config), layer_idx)  # type: ignore[arg-type]
        self.config, self.is_causal = config, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        for name in ("q_norm", "k_norm"):
            setattr(self, name, OlmoeRMSNorm(getattr(self, name).weight.shape[0], config.rms_norm_eps))

    @property  # type: ignore[override]
    def layer(self) -> int | None:
        """The network's name of `layer_idx`, the slot in the cache."""
        return self.layer_idx

    @layer.setter
    def layer(self, value: int | None) -> None:
        self.layer_idx = value

    def follow_config(self) -> None:
        """Update what transformers reads from the configuration at each call, for the network and the kernels."""
        if self.clip_qkv != self.config.clip_qkv:
            self.clip_qkv = self.config.clip_qkv

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, T, D), position_embeddings (cos, sin) each (B or 1, T, Dh) -> (B, T, D), probabilities.

        Probabilities are None if the attention implementation does not return them.
        """
        self.follow_config()
        cache = one_cache(kwargs.pop("past_key_values", None), cache)
        attend = CachedAttend(self, attention_mask, cache, kwargs)
        return super().forward(hidden_states, rope_of(position_embeddings), attend), attend.weights


class CachedAttend:
    """`attend` of one attention module for one call. `weights` are the probabilities, if there are any."""

    def __init__(self, module: Any, mask: Any, cache: Cache | None, options: Mapping[str, Any]) -> None:
        self._module, self._mask, self._cache, self._options = module, mask, cache, options
        self.weights: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (B, T, H, Dh), k and v (B, T, G, Dh) -> (B, T, H, Dh)."""
        module, options = self._module, dict(self._options)
        if is_plain(module, self._mask, options) and (out := self._kernels(q, k, v)) is not None:
            return out
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # heads first
        if self._cache is not None:
            k, v, options = updated(self._cache, k, v, module.layer_idx, options)
        out, self.weights = self._attended(q, k, v, options)
        return out

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """transformers' attention: q (B, H, T, Dh), k and v (B, G, S, Dh) -> (B, T, H, Dh), and its probabilities."""
        module, implementation = self._module, self._module.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = module.attention_dropout if module.training else 0.0
        options = {
            "dropout": dropout,
            "scaling": module.scaling,
            "sliding_window": getattr(module.config, "sliding_window", None),
            **options,
        }
        if implementation != "sdpa" or dropout or is_paged(self._cache):
            attended: tuple[Tensor, Tensor | None] = function(module, q, k, v, self._mask, **options)
            return attended
        lower = autocast_dtype(q)
        if lower is not None:  # torch would, and keep both
            q, k, v = (t.to(lower) for t in (q, k, v))
        fused = functools.partial(_output, function, module, self._mask, options)
        plain = functools.partial(_plain_output, fused)
        return twice_differentiable(fused, plain, q, k, v), None

    def _kernels(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """A whole prompt, or one new token, by the C++ kernels; None if they do not fit."""
        module = self._module
        if module.backend not in (AUTO, "cpu") or extension.unsupported(q, k, v) is not None or torch.is_grad_enabled():
            return None
        cache = _growing(module, self._cache)
        if cache is None:
            return None
        if q.shape[1] > 1 and (cache.get_seq_length() or not module.is_causal):
            return None
        return cache.attend(q, k, v)


def _output(function: Any, module: Any, mask: Any, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output of an attention function without probabilities.

    Not a method: the graph of a forward pass keeps it alive, and must not keep the cache, whose keys keep the graph.
    """
    out: Tensor = function(module, q, k, v, mask, **options)[0]
    return out


def _plain_output(fused: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with plain_attention():
        return fused(*inputs)


def is_plain(module: Any, mask: Any, options: Mapping[str, Any]) -> bool:
    """Whether attention here is what the kernels compute; masks and further options are left to transformers."""
    return module.config._attn_implementation == "sdpa" and mask is None and options.keys() <= _ORDINARY


def step(
    layers: Sequence[Any],
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Any,
    cache: Cache | None,
    options: Mapping[str, Any],
    kind: type[DecoderLayer],
) -> tuple[Tensor, Sequence[RouterOutput]] | None:
    """One new token of each sequence through all `layers`, of type `kind`, in one call of the C++ kernels.

    x (B, 1, D) -> (B, 1, D) and what each router decided; None, with nothing done, if they do not fit.
    """
    batch, count = x.shape[:2]
    if count > 1 or batch > STEP_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    caches: list[GrowingLayer] = []

    def reserve() -> list[CachedTokens] | None:
        rooms: list[CachedTokens] = []
        for layer in layers:
            module: Any = layer.self_attn
            growing = _growing(module, cache) if is_plain(module, mask, options) else None
            if growing is None or any(growing is other for other in caches):
                return None  # layers that share a slot of the cache see each other's keys in turn
            kv_heads = module.k_norm.weight.shape[0] // module.head_dim
            room = growing.room(batch, kv_heads, module.head_dim, x.dtype)
            if room is None or (rooms and not room.like(rooms[0])):
                return None
            caches.append(growing)
            rooms.append(room)
        return rooms

    whole = all_layers(list(layers), kind, x, rope_of(position_embeddings), reserve)
    if whole is not None:
        for growing in caches:
            growing.filled()
    return whole


def _growing(module: Any, cache: Cache | None) -> GrowingLayer | None:
    """The layer of the cache that the kernels may extend; None if attention is not what they compute."""
    layer = growing_layer(cache, module.layer_idx)  # even if attention is not computed here
    if module.scaling != module.head_dim**-0.5 or (module.training and module.attention_dropout):
        return None
    return layer


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
