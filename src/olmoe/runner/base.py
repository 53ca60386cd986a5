"""What every runner takes and returns: one call for prompts, chunks of prompts, decoding steps or any mixture of them.

A runner is compiled once from the weights of a model, and immutable from then on. It knows neither requests nor text.

Shapes legend: B sequences of a call, N new tokens of all of them end to end, R rows whose logits are wanted, L layers,
K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import UserError
from olmoe.model import CausalLM
from olmoe.ops import cache
from olmoe.ops.cache import BlockCache, Table
from olmoe.quant import PackedModule
from olmoe.runner.policy import ResolvedPolicy


class Unfit(Exception):
    """A model that a runner cannot compute; the message says why."""


class CacheView(NamedTuple):
    """The cache for the sequences of one call: all blocks, and the table (B, W) of the blocks of each sequence."""

    blocks: BlockCache
    table: Table


@dataclass(frozen=True)
class Batch:
    """New tokens of B sequences, end to end: `counts[b]` of each, after `lengths[b]` tokens already in the cache.

    `totals` is the length that each sequence is known to reach with tokens still to come, by default with those of
    this call; "dynamic" RoPE depends on it. `policies` are the sequences' router policies, by default none.
    """

    ids: Sequence[int]
    counts: Sequence[int]
    lengths: Sequence[int]
    totals: Sequence[int] | None = None
    policies: Sequence[ResolvedPolicy | None] | None = None

    def check(self, vocab_size: int) -> None:
        """Assert that the numbers fit together, and raise `IndexError` for ids outside the vocabulary."""
        assert len(self.counts) == len(self.lengths)
        assert len(self.ids) == sum(self.counts)
        if self.ids and not 0 <= min(self.ids) <= max(self.ids) < vocab_size:
            raise IndexError(f"ids from {min(self.ids)} to {max(self.ids)} are not all below {vocab_size}")

    def positions(self) -> list[int]:
        """The position of each token in its sequence."""
        pairs = zip(self.lengths, self.counts, strict=True)
        return [position for length, count in pairs for position in range(length, length + count)]

    def ends(self) -> list[int]:
        """The row of each sequence's last new token."""
        ends, row = [], -1
        for count in self.counts:
            row += count
            ends.append(row)
        return ends

    def sequence_of_token(self) -> list[int]:
        """The number of the sequence that each token belongs to."""
        return [b for b, count in enumerate(self.counts) for _ in range(count)]


@dataclass(frozen=True)
class Want:
    """Which rows of the call need logits, and for which rows the routing is wanted."""

    logits: Sequence[int]
    traced: Sequence[int] = field(default=())


class RouterTrace(NamedTuple):
    """What routers chose: expert ids (R, L, K) int16, -1 where a policy chooses fewer, and weights (R, L, K) fp32."""

    expert_ids: Tensor
    weights: Tensor


class StepOutput(NamedTuple):
    """Logits (R, V) of the requested rows, in fp32, and the trace if it was requested."""

    logits: Tensor
    trace: RouterTrace | None


class Runner(Protocol):
    """One model, compiled for one kind of device."""

    config: ModelConfig
    cache_dtype: torch.dtype  # of keys and values, by default
    chunk_tokens: int  # larger calls than this many new tokens are not faster
    block_positions: int  # sequences take a multiple of this many positions in a cache of `new_cache`

    @property
    def position_bytes(self) -> int:
        """Bytes of one token's keys and values in a cache of `cache_dtype`, for all layers.

        `base.position_bytes` is the same for other dtypes.
        """
        ...

    def new_cache(
        self, sequences: int, positions: int, dtype: torch.dtype | None = None, block_size: int | None = None
    ) -> BlockCache:
        """An empty cache for that many sequences of that length, in blocks of `block_size` positions.

        A `dtype` of int8 takes half the memory of fp16, and rounds each row of a head's keys or values to signed bytes
        with its own scale. A `block_size` of None is one block per sequence, which is read fastest: after 2048 tokens a
        twentieth faster than blocks of 64.
        """
        ...

    def forward(self, batch: Batch, cache: CacheView, want: Want) -> StepOutput:
        """Run new tokens through the network: write their keys and values to the cache, and return what `want` asks."""
        ...


# The names that `to_cache_dtype` understands: torch's, and the short ones that other engines use.
_CACHE_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "f32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "f16": torch.float16, "half": torch.float16,
    "int8": torch.int8,
}  # fmt: skip


def to_cache_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A cache dtype for `Runner.new_cache` from a user's name for it; None and "auto" mean the runner's own.

    Raises `UserError` for any but fp32, bf16, fp16 and int8.
    """
    if name is None or name == "auto":
        return None
    found = _CACHE_DTYPES.get(name) if isinstance(name, str) else name
    if found not in _CACHE_DTYPES.values():
        raise UserError(f"The KV cache cannot be of {name!s}; choose auto, float32, bfloat16, float16 or int8.")
    return found


def position_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in a cache of `dtype`, for all layers, scales included."""
    return cache.position_bytes(config.num_hidden_layers, config.kv_heads, config.head_dim, dtype)


def default_cache_dtype(model: CausalLM) -> torch.dtype:
    """The dtype of hidden states; 16 bits for a packed model, whose hidden states are fp32."""
    packed = any(isinstance(module, PackedModule) for module in model.modules())
    hidden: torch.dtype = model.model.norm.weight.dtype
    return torch.float16 if packed and hidden == torch.float32 else hidden
