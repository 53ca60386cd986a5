"""How fast a run trains, what share of the device's speed that is, and how much memory it takes.

The model FLOPs of a token are 6 x the parameters that it is multiplied with: those that one token uses, routers and
output head included, but not the input embedding, which is looked up. Products within attention (queries with keys,
weights with values) are left out, and what is computed again in backward does not count. MFU is these FLOPs, times
tokens per second, over what the devices could do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from olmoe.config import ModelConfig
from olmoe.runtime import log, peak_memory_bytes
from olmoe.train.ranks import ALONE, Ranks

# A shorter product measures the overhead of starting it more than the device.
_LEAST_SECONDS = 0.01
_SIZES = (512, 1024, 2048, 4096, 8192)
_ROUNDS = 3


@dataclass(frozen=True)
class Throughput:
    """The reference for a step's time: the FLOPs of a token, and the FLOPs per second of all ranks' devices."""

    flops_per_token: int
    peak_flops: float
    device: torch.device
    ranks: Ranks

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        device: torch.device,
        peak_flops: float | None,
        ranks: Ranks = ALONE,
        more_parameters: int = 0,
    ) -> Throughput:
        """For a run of this model, and active parameters besides, by these ranks.

        What one device can do is measured where it is not stated.
        """
        if peak_flops is None:
            peak_flops = product_rate(device)
            log.info("MFU is relative to the product rate of %s, %.1f GFLOP/s", device, peak_flops / 1e9)
        return cls(
            flops_per_token(model) + 6 * more_parameters,
            float(ranks.sum(torch.tensor(peak_flops, dtype=torch.float64))),
            device,
            ranks,
        )

    def values(self, tokens: int, seconds: float) -> dict[str, float]:
        """What a metrics record says of a step of so many tokens that took so long. All ranks call it together."""
        rate = tokens / seconds
        speed = {
            "tokens_per_second": rate,
            "mfu": self.flops_per_token * rate / self.peak_flops,
            "peak_flops": self.peak_flops,
        }
        memory = {"peak_memory_bytes": peak_memory_bytes()}
        if self.device.type == "cuda":
            memory["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return speed | dict(zip(memory, self._greatest(*memory.values()), strict=True))

    def _greatest(self, *own: int) -> list[int]:
        """The maximum of each number over the ranks."""
        if self.ranks.size == 1:
            return list(own)
        by_rank = torch.zeros(self.ranks.size, len(own), dtype=torch.int64)
        by_rank[self.ranks.rank] = torch.tensor(own)
        greatest: list[int] = self.ranks.sum(by_rank).amax(dim=0).tolist()
        return greatest


def flops_per_token(model: ModelConfig) -> int:
    """Model FLOPs of training on one token; see above."""
    looked_up = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return 6 * (model.num_active_parameters - looked_up)


def product_rate(device: torch.device) -> float:
    """FLOPs per second of a product of two square fp32 matrices, large enough to show what the device can do."""
    rate = 0.0
    for size in _SIZES:
        a, seconds = torch.ones(size, size, device=device), float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            torch.mm(a, a)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds = min(seconds, time.perf_counter() - started)
        rate = max(rate, 2 * size**3 / seconds)
        if seconds >= _LEAST_SECONDS:
            break
    return rate
