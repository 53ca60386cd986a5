"""An upper bound on decoding speed: the bytes that a step must read, and the bandwidth of the memory they come from.

Shapes legend: B sequences, E experts, K experts per token, D hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from olmoe.model import CausalLM, Experts
from olmoe.ops import cpu
from olmoe.ops.cpu.extension import kernels
from olmoe.quant import PackedExperts
from olmoe.runner.base import default_cache_dtype, position_bytes


class StepBytes(NamedTuple):
    """The least number of bytes that one decoding step of B sequences reads."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.weights + self.cache


@dataclass(frozen=True)
class Ceiling:
    """What memory allows: how many times per second the `step` of a batch can be read at `bytes_per_second`."""

    bytes_per_second: float
    step: StepBytes
    batch: int

    @property
    def tokens_per_second(self) -> float:
        """The upper bound on decoding speed."""
        return self.batch * self.bytes_per_second / self.step.total

    def to_dict(self) -> dict[str, float]:
        """For JSON: GB are 10^9 bytes."""
        return {
            "read_gb_per_s": round(self.bytes_per_second / 1e9, 2),
            "weights_gb_per_step": round(self.step.weights / 1e9, 6),
            "kv_cache_gb_per_step": round(self.step.cache / 1e9, 6),
            "decode_tokens_per_s": round(self.tokens_per_second, 2),
        }


def step_bytes(model: CausalLM, context: int, batch: int = 1, cache_dtype: torch.dtype | None = None) -> StepBytes:
    """What a decoding step of `batch` sequences reads after `context` tokens each.

    Weights are all but the embeddings; K of the E experts for one sequence, and for several as many as they choose
    together if each chooses evenly. `cache_dtype` is by default that of `LLM`. `model` may be on the meta device.
    """
    config, weights = model.config, 0.0
    share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    for name, module in model.named_modules():
        if name == "model.embed_tokens":
            continue  # one row of it
        size = sum(p.numel() * p.element_size() for p in module._parameters.values() if p is not None)
        weights += size * share if isinstance(module, Experts | PackedExperts) else size
    per_token = position_bytes(config, cache_dtype or default_cache_dtype(model))
    return StepBytes(round(weights), batch * context * per_token)


def read_bandwidth(repeats: int = 5, size: int = 2**30) -> float:
    """The best rate, in bytes per second, of plain reads of `size` bytes, with as many threads as torch has.

    `size` is a multiple of 2^20, and larger than any cache.
    """
    # No two equal pages: a host of virtual machines may merge equal ones, and reads then come from caches.
    block = torch.arange(size // 4, dtype=torch.int32)
    compiled = cpu.available()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        if compiled:
            kernels().read(block.data_ptr(), size)
        else:
            block.view(torch.float32).sum()
        times.append(time.perf_counter() - started)
    return size / min(times)
