"""A decoding step through all layers of a decoder in one call of the C++ kernels.

While a layer runs, weights evict Python's objects from the caches: with a separate call for every layer, a tenth of a
step was spent on fetching them again.

Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from olmoe.hf.kernel_layer import inputs_fit
from olmoe.hf.router_policy import alike, router_policy_of
from olmoe.model import RouterOutput
from olmoe.ops.cache import BlockCache, one_block_each
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import CachedTokens
from olmoe.runner.compile import HOOKS, CompiledLayer

# Rows that one call for all layers may take: a decoding step, even for many sequences, but no long prompt.
STEP_ROWS = 64


class StackedRouters(Sequence[RouterOutput]):
    """What the routers of all layers decided, kept together; a layer's `RouterOutput` is made on request."""

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


def all_layers(
    layers: list[Any],
    kind: type,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    reserve: Callable[[], list[CachedTokens] | None],
) -> tuple[Tensor, Sequence[RouterOutput]] | None:
    """All `layers` in one call of the kernels: x (..., D) -> (..., D) and what each router decided.

    `reserve` gives room for the new tokens in the cache of each layer, or None; it is called if everything else fits.
    Layers of a type other than `kind` might compute something else. None, with nothing done, if anything does not fit.
    """
    if not layers or not inputs_fit(x, rope):
        return None
    stack: list[CompiledLayer] = []
    for layer in layers:
        compiled = layer.current(x) if _unmodified(layer, kind) else None
        if compiled is None or (stack and compiled.signature() != stack[0].signature()):
            return None
        stack.append(compiled)
    first, policies = stack[0], [router_policy_of(layer) for layer in layers]
    policy = policies[0]
    if not alike(policies):
        return None
    tokens = reserve()
    if tokens is None:
        return None
    rows_ND = extension.wide(x).view(-1, first.hidden)
    shape = (*x.shape[:-1], first.head_dim // 2)
    cos, sin = (extension.wide(t.expand(shape)) for t in rope)
    assert all(cache.counts == tokens[0].counts and cache.lengths == tokens[0].lengths for cache in tokens)
    cache = BlockCache([c.keys for c in tokens], [c.values for c in tokens])
    assert len(tokens) == len(stack)
    tokens[0].check(len(rows_ND), first.kv_heads, first.head_dim)
    for compiled in stack:
        compiled.refresh()
    n, count = len(rows_ND), len(stack)
    # The kernels write over their input, which may be the caller's.
    rows_ND = rows_ND.clone() if rows_ND.data_ptr() == x.data_ptr() else rows_ND
    y, logits = torch.empty(n, first.hidden), torch.empty(count, n, first.experts)
    top_k = first.top_k if policy is None else policy.kernel.largest
    weights, ids = torch.empty(count, n, top_k), torch.empty(count, n, top_k, dtype=torch.long)
    extension.kernels().Layer.forward_all(
        [compiled.kernel for compiled in stack],
        rows_ND.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens[0].counts,
        tokens[0].lengths,
        one_block_each(len(tokens[0].counts)),
        cache.kernel,
        y.data_ptr(),
        logits.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        None if policy is None else policy.kernel.kernel,
    )
    return y.to(x.dtype).view(x.shape), StackedRouters(logits, weights, ids)


def _unmodified(layer: Any, kind: type) -> bool:
    """Whether calling `layer` would run `forward` of its class `kind` and nothing else."""
    return not any(getattr(layer, hooks) for hooks in HOOKS) and type(layer) is kind and "forward" not in vars(layer)
