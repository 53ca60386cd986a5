"""What `olmoe bench` measures: prefill and decode of the engine, beside the memory bandwidth that bounds decoding.

Speed does not depend on what weights hold, so models of random codes stand in for checkpoints.

Shapes legend: B sequences, E experts, K experts per token, D hidden.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import olmoe
from olmoe.config import ModelConfig
from olmoe.engine.running import RunningSequences
from olmoe.errors import UserError, shown
from olmoe.model import CausalLM, Experts, allocate
from olmoe.ops import AUTO, cpu
from olmoe.ops.cpu.extension import kernels
from olmoe.quant import PackedExperts, PackedLayout, PackedModule
from olmoe.quant.formats.blocks import BLOCK, GROUP, SCALE_BYTES
from olmoe.runner import make_runner
from olmoe.runner.base import default_cache_dtype
from olmoe.runtime import available_memory_bytes
from olmoe.weights import packed
from olmoe.weights.quantize import RECIPES

PLAIN_FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = ("int4", "int8", *PLAIN_FORMATS)  # that the command line names; those of `packing.RECIPES` work too
_NOISE = 2**22 - 3  # odd, so that matrices, whose sizes are powers of two, start at different offsets of the block
_SCALE = 0x1000  # 2^-11 as fp16: products of random codes stay small
# Embeddings are this much larger, so that tokens stay different through all layers and choose different experts.
_EMBEDDING_SCALE, _EMBEDDING_FACTOR = 0x2C00, 2**7
_WARM_UP = 16


class StepBytes(NamedTuple):
    """Bytes that one decoding step of B sequences reads at least."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.cache


@dataclass(frozen=True)
class Ceiling:
    """What memory allows: reads of `bytes_per_second` deliver the `step` of a batch so many times a second."""

    bytes_per_second: float
    step: StepBytes
    batch: int

    @property
    def tokens_per_second(self) -> float:
        """At most."""
        return self.batch * self.bytes_per_second / self.step.total

    def to_dict(self) -> dict[str, float]:
        """For JSON: GB are 10^9 bytes."""
        return {
            "read_gb_per_s": round(self.bytes_per_second / 1e9, 2),
            "weights_gb_per_step": round(self.step.weights / 1e9, 6),
            "kv_cache_gb_per_step": round(self.step.cache / 1e9, 6),
            "decode_tokens_per_s": round(self.tokens_per_second, 2),
        }


# ---- models of random weights ----


def skeleton(config: ModelConfig, format: str, overrides: dict[str, str] | None = None) -> CausalLM:
    """A model of the given shapes in `format`, on the meta device. Arguments and errors as for `random_model`."""
    if format in RECIPES:
        recipe = RECIPES[format]
        model = packed.build(config, PackedLayout(recipe.weight_format, {**recipe.overrides, **(overrides or {})}))
        return model.float()
    if format not in PLAIN_FORMATS:
        raise UserError(f"Unknown format {shown(format)}; choose one of {', '.join((*RECIPES, *PLAIN_FORMATS))}.")
    with torch.device("meta"):
        return CausalLM(config).to(PLAIN_FORMATS[format])


def random_model(config: ModelConfig, format: str, overrides: dict[str, str] | None = None) -> CausalLM:
    """A model of the given shapes with random weights, packed or plain, ready for inference.

    `format` is a recipe of `olmoe.weights.quantize`, "bf16" or "fp32"; `overrides` are further ones of `PackedLayout`.
    Each matrix is allocated once and filled with copies of a block of noise. Raises `UserError` for an unknown format,
    and where the memory does not suffice.
    """
    model = skeleton(config, format, overrides)
    require_memory(sum(p.numel() * p.element_size() for p in model.parameters()), format)
    model = allocate(model, "cpu").requires_grad_(False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE, generator=generator) * config.initializer_range
    # Codes spread evenly around that of zero: weights with a mean would make all tokens alike after a layer.
    low, high = torch.randint(1, 16, (2, _NOISE), generator=generator, dtype=torch.uint8)
    nibbles, whole = low | high << 4, torch.randint(1, 256, (_NOISE,), generator=generator, dtype=torch.uint8)
    start = 0
    for path, module in model.named_modules():
        embedding = path == "model.embed_tokens"
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif parameter.dtype != torch.uint8:
                start = _fill(parameter, (noise * (_EMBEDDING_FACTOR if embedding else 1)).to(parameter.dtype), start)
            else:
                assert isinstance(module, PackedModule)
                start = _fill(parameter, whole if module.formats[name].bits == 8 else nibbles, start)
                scale_bytes = module.shapes[name][1] // BLOCK * GROUP * SCALE_BYTES  # they end each group of rows
                parameter[..., -scale_bytes:].view(torch.int16).fill_(_EMBEDDING_SCALE if embedding else _SCALE)
    packed.set_compute_dtype(model, torch.float32)
    return model.eval()


def _fill(out: Tensor, values: Tensor, start: int) -> int:
    """Copy `values`, over and over from `start` on, to all of `out`; where the next tensor should start."""
    flat, done = out.view(-1), 0
    while done < flat.numel():
        part = values[start : start + flat.numel() - done]
        flat[done : done + len(part)].copy_(part)
        done, start = done + len(part), (start + len(part)) % len(values)
    return start


def require_memory(size: int, format: str) -> None:
    """Raise `UserError` if `size` bytes of weights do not fit the memory, where the system says how much is free.

    Otherwise it would kill a process, not always this one. `format` names the weights in the message.
    """
    free = available_memory_bytes()
    if free is not None and size > free:
        raise UserError(
            f"Weights in {format} would take {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free; "
            "choose a format of fewer bits or a smaller model."
        )


# ---- ceilings ----


def step_bytes(model: CausalLM, context: int, batch: int = 1, cache_dtype: torch.dtype | None = None) -> StepBytes:
    """What a decoding step of `batch` sequences reads after `context` tokens each.

    Weights are all but the embeddings; of the experts K of E for one sequence, and for several as many as they choose
    together if each chooses evenly. `cache_dtype` is by default that of `LLM`. `model` may be on the meta device.
    """
    config, weights = model.config, 0.0
    share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    for name, module in model.named_modules():
        if name == "model.embed_tokens":
            continue  # one row of it
        size = sum(p.numel() * p.element_size() for p in module._parameters.values() if p is not None)
        weights += size * share if isinstance(module, Experts | PackedExperts) else size
    per_token = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
    dtype = cache_dtype or default_cache_dtype(model)
    return StepBytes(round(weights), batch * context * per_token * dtype.itemsize)


def read_bandwidth(repeats: int = 5, size: int = 2**30) -> float:
    """Bytes a second that plain reads of `size` bytes reach at best, with as many threads as torch has.

    `size` is a multiple of 2^20, and more than any cache holds.
    """
    # No two pages alike: a host of virtual machines may keep one of many equal ones, and reads then come from caches.
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


def reset_peak_memory() -> None:
    """Let `runtime.peak_memory_bytes` start anew from what is resident now, where the system can do that (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


# ---- speed ----


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
        """Seconds for a prompt of `length` random ids for every one of empty sequences, to the last logits."""
        prompts = [self._ids(length) for _ in running.lengths]
        started = time.perf_counter()
        running.prefill(prompts)
        return time.perf_counter() - started

    def decode(self, running: RunningSequences) -> float:
        """Seconds for one new token of every sequence, the choice of the likeliest included."""
        ids = self._ids(len(running.lengths))
        started = time.perf_counter()
        running.step(ids).numpy().argmax(-1)  # torch would start its threads for it, which then spin beside ours
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
    """Tokens a second: medians of `repeats` prefills of `prefill` tokens, and of `decode` steps after `context`.

    Decoding steps all `batch` sequences at once, and counts the tokens of all. `progress(done, total)` is called after
    each prompt and each step. Raises `UserError` for numbers below 1.
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


def machine_facts() -> dict[str, Any]:
    """Processor, threads, instruction set, versions, date, and the commit of a checkout."""
    names = [platform.processor() or platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")] or names
    except OSError:
        pass
    facts: dict[str, Any] = {
        "cpu": names[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if cpu.available() else None,
        "versions": {"olmoe": olmoe.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    if (commit := _commit()) is not None:
        facts["commit"] = commit
    return facts


def _commit() -> str | None:
    """The commit that this file belongs to; None for an installed package, though it may lie in someone's checkout."""
    here = Path(__file__)
    for command in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "--short", "HEAD")):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=here.parent, check=False)
        except OSError:
            return None
        if done.returncode != 0:
            return None
    return done.stdout.strip()
