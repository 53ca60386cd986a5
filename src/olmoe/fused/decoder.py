"""A step of decoding through all layers of a decoder in one call of the C++ kernels.

Between two layers of one sequence, what Python looks at has left the caches for weights: a tenth of a step was spent
on that when every layer was a call of its own.

Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from olmoe.fused.decoder_layer import FusedDecoderLayer, inputs_fit
from olmoe.fused.prepared_decoder import PreparedDecoder
from olmoe.fused.prepared_layer import PreparedLayer
from olmoe.fused.watch import has_hooks
from olmoe.model import Attend, Decoder, Output, RouterOutput
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import CachedLayers, CachedTokens
from olmoe.ops.transforms import observed, transformed

# Rows that one call for all layers may take: a step of decoding, for many sequences too, but no long prompt.
STEP_ROWS = 64


class StackedRouters(Sequence[RouterOutput]):
    """What the routers of all layers decided, kept together; a layer's `RouterOutput` is made when it is asked for."""

    def __init__(self, logits_LNE: Tensor, weights_LNK: Tensor, ids_LNK: Tensor) -> None:
        self._stacked = logits_LNE, weights_LNK, ids_LNK

    def __len__(self) -> int:
        return len(self._stacked[0])

    @overload
    def __getitem__(self, index: int) -> RouterOutput: ...
    @overload
    def __getitem__(self, index: slice) -> list[RouterOutput]: ...
    def __getitem__(self, index: int | slice) -> RouterOutput | list[RouterOutput]:
        """The layer `index`, or a list of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return RouterOutput(*(t[index] for t in self._stacked))


class FusedDecoder(Decoder):
    """`Decoder` whose layers, where all of them fit the kernels and a KV cache of ours, are computed in one call.

    For steps of decoding. Prompts go layer by layer, so that they can be interrupted.
    """

    _whole: PreparedDecoder | None = None

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, length: Tensor | None = None) -> Output:
        """See `Decoder.forward`."""
        caches = getattr(attend, "all_cached", None)
        step = None if caches is None else self.step(input_ids, positions, caches, length)
        return super().forward(input_ids, positions, attend, length) if step is None else Output(*step[:2])

    def blocks(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Sequence[RouterOutput]]:
        """See `Decoder.blocks`."""
        cached = getattr(attend, "cached", None)
        if cached is None or x.numel() > STEP_ROWS * x.shape[-1]:
            return super().blocks(x, rope, attend)
        layers: list[Any] = list(self.layers)
        whole = all_layers(
            layers, FusedDecoderLayer, x, rope, lambda: [cached(layer.self_attn.layer) for layer in layers]
        )
        return whole or super().blocks(x, rope, attend)

    def step(
        self, input_ids: Tensor, positions: Tensor, caches: CachedLayers, length: Tensor | None, head: Any = None
    ) -> tuple[Tensor, Sequence[RouterOutput], Tensor] | None:
        """`forward` with as little as possible around the one call; None, and nothing done, where it does not fit.

        ids and positions (N,) -> hidden states (N, D), what each router decided, and products with the kernels' matrix
        `head` (R, D): (N, R), with no rows if there is none.
        """
        n = input_ids.numel()
        if not 0 < n <= STEP_ROWS or not _plain_ids(input_ids, positions) or _has_any_global_hook():
            return None
        whole = self._prepared_whole(n)
        if whole is None or (head is not None and head.columns != whole.layers[0].hidden):
            return None
        first = whole.layers[0]
        ids, places = input_ids.tolist(), positions.tolist()
        if min(places) < 0 or not caches.fit(n, len(whole.layers), first.kv_heads, first.head_dim):
            return None
        if min(ids) < 0 or max(ids) >= whole.vocab_size:
            raise IndexError(f"ids from {min(ids)} to {max(ids)} are not all below {whole.vocab_size}")
        whole.refresh()
        x, angles = whole.embed(input_ids), whole.angles(positions, max(places), length)
        return _call(first, whole.kernels, x, angles, caches, whole.norm, head)

    def _prepared_whole(self, rows: int) -> PreparedDecoder | None:
        """The kernels' view of all of this decoder as it is now; None where they do not fit it, or so many rows."""
        whole = self._whole
        if whole is None or not whole.still():
            layers: list[Any] = list(self.layers)
            x = torch.empty(1, self.norm.weight.shape[0])
            found = [layer.current(x) for layer in layers if _alone(layer, FusedDecoderLayer)]
            prepared = [p for p in found if p is not None]
            whole = PreparedDecoder(self, prepared if len(prepared) == len(layers) else [])
            object.__setattr__(self, "_whole", whole)  # not a module, parameter or buffer
        return whole if whole.layers and all(layer.fits_rows(rows) for layer in whole.layers) else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own kernels."""
        return {name: value for name, value in self.__dict__.items() if name != "_whole"}


def all_layers(
    layers: list[Any],
    kind: type,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    reserve: Callable[[], list[CachedTokens] | None],
) -> tuple[Tensor, Sequence[RouterOutput]] | None:
    """All `layers` in one call of the kernels: x (..., D) -> (..., D) and what each router decided.

    `reserve` gives room for the new tokens in the cache of each layer, or None; it is called if all else fits. Layers
    of another type than `kind` might do something else. None, and nothing done, where anything does not fit.
    """
    if not layers or not inputs_fit(x, rope):
        return None
    stack: list[PreparedLayer] = []
    for layer in layers:
        prepared = layer.current(x) if _alone(layer, kind) else None
        if prepared is None or (stack and prepared.form() != stack[0].form()):
            return None
        stack.append(prepared)
    first, tokens = stack[0], reserve()
    if tokens is None:
        return None
    rows_ND = extension.wide(x).view(-1, first.hidden)
    shape = (*x.shape[:-1], first.head_dim // 2)
    cos, sin = (extension.wide(t.expand(shape)) for t in rope)
    caches = CachedLayers.of(tokens)
    fit = caches.fit(len(rows_ND), len(stack), first.kv_heads, first.head_dim)
    assert fit
    for prepared in stack:
        prepared.refresh()
    y, routers, _ = _call(first, [prepared.kernel for prepared in stack], rows_ND, (cos, sin), caches)
    return y.to(x.dtype).view(x.shape), routers


def _call(
    first: PreparedLayer,
    stack: list[Any],
    x_ND: Tensor,
    rope: tuple[Tensor, Tensor],
    caches: CachedLayers,
    norm: tuple[int, float] = (0, 0.0),
    head: Any = None,
) -> tuple[Tensor, StackedRouters, Tensor]:
    """The one call, on contiguous fp32: x (N, D), cos, sin (N, Dh/2); see `FusedDecoder.step` for what it gives.

    `norm`: address of the weight and epsilon of a norm for what comes out of the layers; 0 for none.
    """
    n, count = len(x_ND), len(stack)
    y, logits = torch.empty(n, first.hidden), torch.empty(count, n, first.experts)
    weights, ids = torch.empty(count, n, first.top_k), torch.empty(count, n, first.top_k, dtype=torch.long)
    scores = torch.empty(n, 0 if head is None else head.rows)
    extension.kernels().Layer.forward_all(
        stack,
        x_ND.data_ptr(),
        rope[0].data_ptr(),
        rope[1].data_ptr(),
        caches.counts,
        caches.lengths,
        caches.keys,
        caches.values,
        caches.type,
        caches.capacity,
        y.data_ptr(),
        logits.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        *norm,
        head,
        scores.data_ptr(),
    )
    return y, StackedRouters(logits, weights, ids), scores


def _alone(layer: Any, kind: type) -> bool:
    """Whether a call of `layer` would be that of its class `kind` and nothing else."""
    return not has_hooks(layer) and type(layer) is kind and "forward" not in vars(layer)


def _plain_ids(*tensors: Tensor) -> bool:
    """Whether these are ids in memory, as the kernels read them, outside training and tracing."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if transformed() or observed():
        return False
    shape = tensors[0].shape
    return all(
        type(t) is Tensor and t.is_cpu and t.dtype == torch.long and t.dim() == 1 and t.shape == shape
        and t.is_contiguous()
        for t in tensors
    )  # fmt: skip
