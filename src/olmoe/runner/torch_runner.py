"""The plain network as a runner, for any device, any dtype, and any module in place of the network's own.

Shapes legend: B sequences, N new tokens of all of them end to end, T new tokens of one, R wanted rows, H heads, G KV
heads, Dh head dim, L layers, E experts, K experts per token, S cached positions.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import CausalLM, set_backend
from olmoe.ops.cache import BlockCache
from olmoe.runner.base import Batch, CacheView, RouterTrace, StepOutput, Want, default_cache_dtype, position_bytes
from olmoe.runner.policy import ResolvedPolicy, own_policy, stack_policies
from olmoe.runtime import inference_mode


class TorchRunner:
    """A `Runner` that runs the modules of a model: copies of them, which share its weights.

    Later changes to the model, its hooks or its backend have no effect here; weights that are written in place do.
    """

    chunk_tokens = 4096
    block_positions = 1

    def __init__(self, model: CausalLM, backend: str = ops.AUTO) -> None:
        """`backend` computes the operations: "auto", "torch", "reference", or "cpu" (see `olmoe.ops.dispatch`)."""
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._model = copy.deepcopy(model, {id(t): t for t in tensors}).eval()
        set_backend(self._model, backend)
        self.config = model.config
        self.cache_dtype = default_cache_dtype(model)
        self._device = model.model.norm.weight.device

    @property
    def position_bytes(self) -> int:
        """See `Runner.position_bytes`."""
        return position_bytes(self.config, self.cache_dtype)

    def new_cache(
        self, sequences: int, positions: int, dtype: torch.dtype | None = None, block_size: int | None = None
    ) -> BlockCache:
        """See `Runner.new_cache`."""
        config, size = self.config, block_size or positions
        return BlockCache.allocate(
            config.num_hidden_layers,
            sequences * -(-positions // size),
            config.kv_heads,
            size,
            config.head_dim,
            dtype=dtype or self.cache_dtype,
            device=self._device,
        )

    @inference_mode
    def forward(self, batch: Batch, cache: CacheView, want: Want) -> StepOutput:
        """See `Runner.forward`."""
        batch.check(self._model.model.embed_tokens.num_embeddings)
        cache.blocks.check(cache.table, batch.counts, batch.lengths)
        totals = batch.totals or [a + b for a, b in zip(batch.lengths, batch.counts, strict=True)]
        of_token = batch.sequence_of_token()
        ids, positions, length = (
            torch.tensor(numbers, device=self._device)
            for numbers in (list(batch.ids), batch.positions(), [totals[b] for b in of_token])
        )
        policies = None
        if batch.policies is not None and any(policy is not None for policy in batch.policies):
            policies = self._policies(batch, of_token)
        out = self._model(ids, positions, BlockAttend(batch, cache), length, policies)
        logits = self._model.logits(out.hidden[list(want.logits)]).float()
        if not want.traced:
            return StepOutput(logits, None)
        rows = list(want.traced)
        trace = RouterTrace(
            torch.stack([routed.expert_ids[rows] for routed in out.routers], dim=1).to("cpu", torch.int16),
            torch.stack([routed.weights[rows] for routed in out.routers], dim=1).to("cpu", torch.float32),
        )
        return StepOutput(logits, trace)

    def _policies(self, batch: Batch, of_token: list[int]) -> list[ops.RoutePolicy]:
        """One policy per layer, for all tokens of the batch."""
        assert batch.policies is not None
        own = own_policy(self.config)
        return route_policies([own if policy is None else policy for policy in batch.policies], self._device, of_token)


def route_policies(
    policies: Sequence[ResolvedPolicy], device: torch.device, of_token: Sequence[int] | None = None
) -> list[ops.RoutePolicy]:
    """What `ops.route` takes for each layer: a row for each index in `of_token`, or else for each of `policies`."""
    stacked = stack_policies(policies)
    rows = list(range(len(policies))) if of_token is None else list(of_token)
    tensors = [None if array is None else torch.from_numpy(array)[rows].to(device) for array in stacked]
    bias_NLE, top_k_N, renormalize_N, pinned_NLE, temperature_NL = tensors
    assert bias_NLE is not None
    assert top_k_N is not None
    assert renormalize_N is not None
    width = max(policies[number].top_k for number in rows)
    return [
        ops.RoutePolicy(
            bias_NLE[:, layer],
            top_k_N,
            renormalize_N,
            width,
            None if pinned_NLE is None else pinned_NLE[:, layer],
            None if temperature_NL is None else temperature_NL[:, layer],
        )
        for layer in range(bias_NLE.shape[1])
    ]


class BlockAttend:
    """The network's `attend` over a block cache, to which the new keys and values are added first."""

    def __init__(self, batch: Batch, cache: CacheView) -> None:
        self._counts, self._lengths, (self._blocks, self._table) = batch.counts, batch.lengths, cache
        self._mask: Tensor | None = None
        if self._one_each and min(batch.lengths) != max(batch.lengths):
            lengths = torch.tensor(list(batch.lengths)).view(-1, 1, 1, 1)
            slots = torch.arange(max(batch.lengths) + 1)
            self._mask = (slots <= lengths).to(cache.blocks.device)  # (B, 1, 1, S)

    @property
    def _one_each(self) -> bool:
        """Whether this is a decoding step: one new token for each sequence."""
        return all(count == 1 for count in self._counts)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (N, H, Dh), k and v (N, G, Dh) -> (N, H, Dh)."""
        start, parts = 0, []
        for b, (count, length) in enumerate(zip(self._counts, self._lengths, strict=True)):
            new = slice(start, start + count)
            self._blocks.write(layer, self._table[b], length, k[new], v[new])
            parts.append(new)
            start += count
        if self._one_each:
            return self._step(q, layer)
        outputs = []
        for b, new in enumerate(parts):
            if new.start == new.stop:
                continue
            seen = self._lengths[b] + self._counts[b]
            keys, values = (t.to(q.dtype) for t in self._blocks.read(layer, self._table[b : b + 1], seen))
            attended = ops.attention(q[new].transpose(0, 1).unsqueeze(0), keys, values, causal=True)
            outputs.append(attended[0].transpose(0, 1))
        return torch.cat(outputs)

    def _step(self, q: Tensor, layer: int) -> Tensor:
        keys, values = self._blocks.read(layer, self._table, max(self._lengths) + 1)
        if self._mask is not None:
            # Positions beyond the end of a shorter sequence were never written; masked NaNs would still poison sums.
            unseen = ~self._mask.transpose(-1, -2)
            keys, values = keys.masked_fill(unseen, 0.0), values.masked_fill(unseen, 0.0)
        return ops.attention(q.unsqueeze(2), keys.to(q.dtype), values.to(q.dtype), self._mask).squeeze(2)
