"""transformers' dynamic cache without its copies, and attention over it by the C++ kernels.

`DynamicCache` concatenates: every new token copies all keys and values before it, in every layer. Here a layer of such
a cache keeps room after them, writes new ones in place and shows the filled part. Its contents and methods stay those
of transformers; tensors that other methods put there (cropping, beams) are adopted at the next token.

Shapes legend: B batch, T new tokens, S cached tokens, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from olmoe.hf.view import view_as
from olmoe.ops.cpu.functional import CachedTokens, cached_attention
from olmoe.ops.transforms import transformed
from olmoe.runtime import outside_inference_mode

_LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` whose keys and values (B, G, S, Dh) are views of larger tensors. Without gradients only."""

    _room: tuple[Tensor, Tensor] | None = None
    _shown: tuple[Tensor, Tensor] | None = (
        None  # the views of `_room` that `keys` and `values` are unless they were replaced
    )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`."""
        if not self._can_grow(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        start, (keys, values) = self._reserve(key_states)
        end = start + key_states.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        return self._show(end)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Add new tokens, k and v (B, T, G, Dh), and attend causally to all: q (B, T, H, Dh) -> (B, T, H, Dh).

        None, with nothing added, if this layer cannot grow.
        """
        batch, count = q.shape[:2]
        heads_first = k.transpose(1, 2)
        if not self._can_grow(heads_first, v.transpose(1, 2)):
            return None
        length, (keys, values) = self._reserve(heads_first)
        q_N, k_N, v_N = (t.flatten(0, 1) for t in (q, k, v))
        out = cached_attention(q_N, k_N, v_N, [count] * batch, [length] * batch, keys, values)
        self._show(length + count)
        return out.view(q.shape)

    def room(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> CachedTokens | None:
        """Room for one more token of each sequence, which `filled` then shows.

        None if this layer is empty, or holds anything but keys and values of these shapes.
        """
        token = torch.empty((batch, kv_heads, 1, head_dim), dtype=dtype)
        if self.get_seq_length() == 0 or not self._can_grow(token, token):
            return None
        length, (keys, values) = self._reserve(token)
        return CachedTokens(keys, values, [1] * batch, [length] * batch)

    def filled(self) -> None:
        """Show the token that has been written into `room`."""
        self._show(self.get_seq_length() + 1)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the room, in which two of them would write over each other."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_room", "_shown")}

    def _can_grow(self, k: Tensor, v: Tensor) -> bool:
        """Whether k and v (B, G, T, Dh) can be appended in place, with no autograd graph to preserve."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed() or k.device.type != "cpu":
            return False
        if k.shape != v.shape or k.dtype != v.dtype:
            return False
        if self.get_seq_length() == 0:
            return True
        kept = (*k.shape[:2], k.shape[3])
        return all(t.dtype == k.dtype and (*t.shape[:2], t.shape[3]) == kept for t in (self.keys, self.values))

    def _reserve(self, k: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
        """The number of cached tokens, and tensors (B, G, capacity, Dh) that hold them and have room for `k`."""
        if not self.is_initialized:
            self.lazy_initialization(k, k)
        start = self.get_seq_length()
        mine = self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]
        if mine and self._room is not None and self._room[0].shape[2] >= start + k.shape[2]:
            return start, self._room
        needed = start + k.shape[2]
        shape = (*k.shape[:2], needed + max(needed // 4, _LEAST_ROOM), k.shape[3])
        with outside_inference_mode():  # so that it can be written to in any mode
            room = (torch.empty(shape, dtype=k.dtype), torch.empty(shape, dtype=k.dtype))
        if start:
            room[0][:, :, :start], room[1][:, :, :start] = self.keys, self.values
        self._room = room
        return start, room

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        assert self._room is not None
        self._shown = (self._room[0][:, :, :length], self._room[1][:, :, :length])
        self.keys, self.values = self._shown
        return self._shown


def growing_layer(cache: Any, index: int | None) -> GrowingLayer | None:
    """The growing layer of a plain `DynamicCache`, put there if needed; None for other caches and missing layers."""
    if type(cache) is not DynamicCache or cache.offloading or index is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = view_as(GrowingLayer, layer)
    return layer if type(layer) is GrowingLayer else None
