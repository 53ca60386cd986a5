"""A contiguous key-value cache for a batch of sequences of different lengths.

Shapes legend: B sequences, N tokens of all sequences end to end, H heads, G KV heads, Dh head dim,
S cached positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe import ops
from olmoe.config import ModelConfig
from olmoe.model import Attend, CausalLM
from olmoe.ops import cpu
from olmoe.ops.cpu.functional import CachedLayers, CachedTokens, cached_attention
from olmoe.quant import PackedModule


class KVCache:
    """Keys and values of B sequences, each with its own length, in one (B, G, capacity, Dh) pair a layer.

    `attend_prefill` and `attend_decode` are the network's `attend`; call `advance` once a forward pass. `backend`
    "auto" is the C++ kernels where they are; attention is then computed in fp32 from a cache of any dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        backend: str = ops.AUTO,
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * batch
        self._kernels = backend in (ops.AUTO, "cpu") and device.type == "cpu" and cpu.available()
        self._mask: Tensor | None = None  # (B, 1, 1, S) of the current decode step
        self._places: CachedLayers | None = None  # of `_keys` and `_values`

    @property
    def continues(self) -> bool:
        """Whether `attend_prefill` can be called again, for further tokens of the same prompts."""
        return self._kernels

    def attend_prefill(self, counts: list[int]) -> Attend:
        """`attend` for prompts, or `counts` further tokens of each, laid end to end, (N, H, Dh).

        Each token sees those before it in its own sequence. Unless the cache `continues`, all of a prompt must come at
        once.
        """
        if self._kernels:
            return KernelAttend(self._keys, self._values, counts, self.lengths)
        assert not any(length for length, count in zip(self.lengths, counts, strict=True) if count)
        return PrefillAttend(self._keys, self._values, counts)

    def start_decode(self) -> None:
        """Prepare one decode step: which cached positions each sequence may see, its new token included."""
        shortest, longest = min(self.lengths), max(self.lengths)
        self._mask = None
        if shortest != longest and not self._kernels:
            device = self._keys[0].device
            places = torch.arange(longest + 1, device=device)
            self._mask = places <= torch.tensor(self.lengths, device=device).view(-1, 1, 1, 1)

    @property
    def attend_decode(self) -> Attend:
        """`attend` for one new token of each sequence: q (B, H, Dh), k and v (B, G, Dh) -> (B, H, Dh)."""
        if self._kernels:
            counts = [1] * len(self.lengths)
            if self._places is None:
                self._places = CachedLayers(self._keys, self._values, counts, self.lengths)
            return KernelAttend(self._keys, self._values, counts, self.lengths, self._places.at(counts, self.lengths))
        return self._attend_decode

    def _attend_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        longest = max(self.lengths)
        for row, length in enumerate(self.lengths):
            keys[row, :, length] = k[row]
            values[row, :, length] = v[row]
        seen_keys, seen_values = keys[:, :, : longest + 1], values[:, :, : longest + 1]
        if self._mask is not None:
            # Positions beyond a shorter sequence were never written; masked NaNs would still poison sums.
            seen_keys = seen_keys.masked_fill(~self._mask.transpose(-1, -2), 0.0)
            seen_values = seen_values.masked_fill(~self._mask.transpose(-1, -2), 0.0)
        seen_keys, seen_values = seen_keys.to(q.dtype), seen_values.to(q.dtype)
        return ops.attention(q.unsqueeze(2), seen_keys, seen_values, self._mask).squeeze(2)

    def advance(self, counts: list[int]) -> None:
        """Each sequence has grown by its count."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but `rows`, in that order."""
        index = torch.tensor(rows, device=self._keys[0].device)
        for tensors in (self._keys, self._values):  # one after the other, so that no second cache is needed
            for layer, t in enumerate(tensors):
                tensors[layer] = t.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        self._places = None


def default_cache_dtype(model: CausalLM) -> torch.dtype:
    """That of hidden states; 16 bits for a packed model, whose hidden states are fp32."""
    packed = any(isinstance(module, PackedModule) for module in model.modules())
    hidden: torch.dtype = model.model.norm.weight.dtype
    return torch.float16 if packed and hidden == torch.float32 else hidden


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * dtype.itemsize


class KernelAttend:
    """`attend` by the C++ kernels: `counts` new tokens of each sequence, end to end, after `lengths` cached ones.

    A fused layer asks where the cache is (`cached`), and attends in its own call; a fused decoder does so for all
    layers where there is `all_cached`.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        counts: list[int],
        lengths: list[int],
        all_cached: CachedLayers | None = None,
    ) -> None:
        self._keys, self._values, self._counts, self._lengths = keys, values, counts, lengths
        self.all_cached = all_cached

    def cached(self, layer: int) -> CachedTokens:
        """The cache of a layer."""
        return CachedTokens(self._keys[layer], self._values[layer], self._counts, self._lengths)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (N, H, Dh), k and v (N, G, Dh) -> (N, H, Dh)."""
        return cached_attention(q, k, v, self._counts, self._lengths, self._keys[layer], self._values[layer])


class PrefillAttend:
    """See `KVCache.attend_prefill`; on torch."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], prompt_lengths: list[int]) -> None:
        self._keys, self._values, self._lengths = keys, values, prompt_lengths

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (N, H, Dh), k and v (N, G, Dh) -> (N, H, Dh)."""
        outputs = []
        pieces = zip(*(t.split(self._lengths) for t in (q, k, v)), strict=True)
        for row, (q_T, k_T, v_T) in enumerate(pieces):  # (T, H or G, Dh) of one prompt
            if not len(q_T):
                continue
            heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (q_T, k_T, v_T)]  # (1, H or G, T, Dh)
            self._keys[layer][row, :, : k_T.shape[0]] = heads_first[1][0]
            self._values[layer][row, :, : v_T.shape[0]] = heads_first[2][0]
            outputs.append(ops.attention(*heads_first, causal=True)[0].transpose(0, 1))
        return torch.cat(outputs)
