"""The network on the C++ kernels: one call of them from token ids to logits.

Hidden states are fp32 throughout. A row's logits are the same to the bit whatever else is in the batch, however its
prompt was split, and for any number of threads.

Shapes legend: N new tokens, R wanted rows, L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import itertools

import torch

from olmoe.model import CausalLM
from olmoe.ops.cache import KEY_BLOCK, BlockCache
from olmoe.ops.cpu import extension
from olmoe.runner.base import (
    Batch,
    CacheView,
    RouterTrace,
    StepOutput,
    Unfit,
    Want,
    default_cache_dtype,
    position_bytes,
)
from olmoe.runner.compile import CompiledDecoder
from olmoe.runner.kernel_policies import KernelPolicies
from olmoe.runner.rope_table import RopeTable


class CpuRunner:
    """A `Runner` on the C++ kernels' view of a model's weights, which it keeps alive.

    Raises `Unfit` if the kernels cannot compute the model. Weights replaced and modules changed later take effect only
    in a new runner.
    """

    # With the released shapes every expert gets 64 of them on average, enough for full speed, and a layer's
    # intermediate results take 0.1 GB.
    chunk_tokens = 512
    block_positions = KEY_BLOCK

    def __init__(self, model: CausalLM) -> None:
        reason = extension.unavailable()
        if reason is not None:
            raise Unfit(reason)
        self.config = model.config
        self._compiled = CompiledDecoder(model)
        self._rope = RopeTable(model.model.rotary)
        self.cache_dtype = default_cache_dtype(model)

    @property
    def position_bytes(self) -> int:
        """See `Runner.position_bytes`."""
        return position_bytes(self.config, self.cache_dtype)

    def new_cache(
        self, sequences: int, positions: int, dtype: torch.dtype | None = None, block_size: int | None = None
    ) -> BlockCache:
        """See `Runner.new_cache`. By default fp16 for packed models, and the dtype of others."""
        first = self._compiled.layers[0]
        self._rope.reserve(positions)  # now, rather than within a decoding step
        size = block_size or -(-positions // KEY_BLOCK) * KEY_BLOCK
        return BlockCache.allocate(
            len(self._compiled.layers),
            sequences * -(-positions // size),
            first.kv_heads,
            size,
            first.head_dim,
            dtype=dtype or self.cache_dtype,
            device=torch.device("cpu"),
        )

    def forward(self, batch: Batch, cache: CacheView, want: Want) -> StepOutput:
        """See `Runner.forward`."""
        compiled, blocks, table = self._compiled, cache.blocks, cache.table
        batch.check(compiled.embeddings)
        first = compiled.layers[0]
        assert len(blocks.keys) == len(compiled.layers)
        assert (blocks.kv_heads, blocks.head_dim) == (first.kv_heads, first.head_dim)
        assert blocks.device.type == "cpu"
        blocks.check(table, batch.counts, batch.lengths)
        angles, top_k, policies = self._rope.angles(batch), first.top_k, None
        if batch.policies is not None and any(p is not None for p in batch.policies):
            assert len(batch.policies) == len(batch.counts)
            policies = KernelPolicies([p for p in batch.policies if p is not None], top_k, _policy_of_token(batch))
            assert policies.shape == (len(compiled.layers), first.experts)
            top_k = policies.largest
        logits = torch.empty(len(want.logits), compiled.vocab_size)
        traced = (len(want.traced), len(compiled.layers), top_k)
        ids, weights = torch.empty(traced, dtype=torch.int16), torch.empty(traced)
        extension.kernels()  # with as many threads as torch has
        compiled.kernel.forward(
            batch.ids,
            angles.rows,
            angles.cos.data_ptr(),
            angles.sin.data_ptr(),
            batch.counts,
            batch.lengths,
            table,
            blocks.kernel,
            None if policies is None else policies.kernel,
            want.logits,
            logits.data_ptr(),
            want.traced,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return StepOutput(logits, RouterTrace(ids, weights) if want.traced else None)


def _policy_of_token(batch: Batch) -> list[int]:
    """For each token the index of its policy among the batch's policies, or -1."""
    numbers = itertools.count()
    of_sequence = [-1 if policy is None else next(numbers) for policy in batch.policies or ()]
    return [of_sequence[b] for b in batch.sequence_of_token()]
