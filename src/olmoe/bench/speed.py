"""Prompts and decoding steps of the runner, timed on random ids: what `olmoe bench` reports next to the ceiling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from olmoe.engine.running import RunningSequences
from olmoe.errors import UserError
from olmoe.model import CausalLM
from olmoe.ops import AUTO
from olmoe.runner import make_runner

_WARM_UP = 16


class Measured:
    """Prefill and decode steps of a model on random ids, without a tokenizer. `cache_dtype` as in `LLM`."""

    def __init__(self, model: CausalLM, backend: str = AUTO, cache_dtype: torch.dtype | None = None) -> None:
        self.model, self._runner = model, make_runner(model, backend)
        self.cache_dtype = cache_dtype or self._runner.cache_dtype
        self._generator = torch.Generator().manual_seed(1)

    def sequences(self, batch: int, capacity: int) -> RunningSequences:
        """Sequences with nothing in their cache."""
        return RunningSequences(self._runner, batch, capacity, self.cache_dtype)

    def _ids(self, count: int) -> list[int]:
        return torch.randint(0, self.model.config.vocab_size, (count,), generator=self._generator).tolist()

    def prefill(self, running: RunningSequences, length: int) -> float:
        """Seconds for a prompt of `length` random ids in each of the empty sequences, up to the last logits."""
        prompts = [self._ids(length) for _ in running.lengths]
        started = time.perf_counter()
        running.prefill(prompts)
        return time.perf_counter() - started

    def decode(self, running: RunningSequences) -> float:
        """Seconds for one new token of every sequence, including the choice of the likeliest."""
        ids = self._ids(len(running.lengths))
        started = time.perf_counter()
        running.step(ids).numpy().argmax(-1)  # torch would start its own threads, which then compete with ours
        return time.perf_counter() - started


def measure(
    measured: Measured,
    *,
    prefill: int,
    decode: int,
    context: int,
    batch: int = 1,
    repeats: int = 3,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, float]:
    """Tokens per second: medians of `repeats` prefills of `prefill` tokens, and of `decode` steps after `context`.

    All `batch` sequences are decoded at once, and the tokens of all are counted. `progress(done, total)` is called
    after each prompt and each step. Raises `UserError` for numbers below 1.
    """
    if min(prefill, decode, context, batch, repeats) < 1:
        raise UserError("Prefill, decode, context, batch and repeats must be at least 1.")
    total, done = repeats + batch + decode, 0
    measured.prefill(measured.sequences(1, _WARM_UP), _WARM_UP)  # the first call of anything is slower
    times = []
    for _ in range(repeats):
        times.append(measured.prefill(measured.sequences(1, prefill), prefill))
        done += 1
        progress(done, total)
    running = measured.sequences(batch, context + decode + 1)
    measured.prefill(running, context)
    done += batch
    progress(done, total)
    measured.decode(running)
    running.lengths = [context] * batch
    steps = []
    for _ in range(decode):
        steps.append(measured.decode(running))
        done += 1
        progress(done, total)
    return {
        "prefill_tokens_per_second": prefill / statistics.median(times),
        "decode_tokens_per_second": batch / statistics.median(steps),
        "decode_tokens_per_second_best": batch / min(steps),
    }
