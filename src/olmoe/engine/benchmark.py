"""What `olmoe bench` measures: prefill and decode of the engine, beside the memory bandwidth that bounds decoding.

Speed does not depend on what weights hold, so models of random codes stand in for checkpoints.

Shapes legend: E experts, K experts per token, D hidden.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmoe import fused, packed
from olmoe.config import ModelConfig
from olmoe.engine.kv_cache import KVCache
from olmoe.errors import UserError
from olmoe.model import CausalLM, Experts, set_backend
from olmoe.ops import cpu
from olmoe.ops.cpu.extension import kernels
from olmoe.quant import PackedExperts, PackedLayout, PackedModule
from olmoe.quant.blocks import SCALE_BYTES

FORMATS = ("int4", "int8", "bf16", "fp32")
_READ_BYTES = 2**30
_SCALE = 0x1000  # 2^-11 as fp16: products of random codes stay small


def random_model(config: ModelConfig, format: str, overrides: dict[str, str] | None = None) -> CausalLM:
    """A model of the given shapes with random weights, packed or plain, ready for inference.

    `format` is one of `FORMATS`; `overrides` are those of `PackedLayout`.
    """
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}; choose one of {', '.join(FORMATS)}.")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    if format in ("int4", "int8"):
        layout = PackedLayout({"int4": "q4_0", "int8": "q8_0"}[format], overrides or {})
        model = packed.build(config, layout)
    else:
        with torch.device("meta"):
            model = CausalLM(config)
    model = model.to_empty(device="cpu")
    noise = (torch.randn(2**22, generator=generator) * config.initializer_range).to(dtype)
    codes = torch.randint(0, 256, (2**22,), generator=generator, dtype=torch.uint8)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter.dtype == torch.uint8:
                assert isinstance(module, PackedModule)
                _fill(parameter.data, codes)
                rows, columns = module.shapes[name]
                scales = parameter.data[..., -(columns // 32) * 16 * SCALE_BYTES :]
                scales.view(torch.int16).fill_(_SCALE)
                del rows
            else:
                value = torch.empty(parameter.shape, dtype=dtype)
                _fill(value, noise) if value.dim() > 1 else value.fill_(1.0)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    packed.set_compute_dtype(model, torch.float32)
    return model.eval().requires_grad_(False)


def _fill(out: Tensor, values: Tensor) -> None:
    flat = out.view(-1)
    for start in range(0, flat.numel(), len(values)):
        piece = flat[start : start + len(values)]
        piece.copy_(values[: len(piece)])


def bytes_per_token(model: CausalLM) -> int:
    """Bytes of weights that decoding one token reads: all but the embeddings, and of the experts those it chose."""
    total = 0
    for name, module in model.named_modules():
        if name == "model.embed_tokens":
            continue
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            size = parameter.numel() * parameter.element_size()
            if isinstance(module, Experts | PackedExperts):
                size = size * model.config.num_experts_per_tok // model.config.num_experts
            total += size
    return total


def read_bandwidth(repeats: int = 5) -> float | None:
    """Bytes a second that plain reads of a gigabyte reach, at best; None without the kernels."""
    if not cpu.available():
        return None
    block = torch.ones(_READ_BYTES, dtype=torch.uint8)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        kernels().read(block.data_ptr(), _READ_BYTES)
        times.append(time.perf_counter() - started)
    return _READ_BYTES / min(times)


class Runner:
    """Prefill and decode steps of a model on random ids, without a tokenizer. `cache_dtype` as in `LLM`."""

    def __init__(self, model: CausalLM, backend: str = "auto", cache_dtype: torch.dtype | None = None) -> None:
        self.model, self.backend = model, backend
        set_backend(model, backend)
        if backend in ("auto", "cpu"):
            fused.fuse(model)
        packed_model = any(isinstance(module, PackedModule) for module in model.modules())
        self.cache_dtype = cache_dtype or (torch.float16 if packed_model else model.model.norm.weight.dtype)
        self._generator = torch.Generator().manual_seed(1)

    def cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache."""
        device = torch.device("cpu")
        return KVCache(self.model.config, batch, capacity, dtype=self.cache_dtype, device=device, backend=self.backend)

    def _ids(self, count: int) -> Tensor:
        return torch.randint(0, self.model.config.vocab_size, (count,), generator=self._generator)

    @torch.inference_mode()
    def prefill(self, cache: KVCache, length: int) -> float:
        """Seconds for a prompt of `length` random ids for every sequence of an empty cache."""
        batch = len(cache.lengths)
        ids, positions = self._ids(batch * length), torch.arange(length).repeat(batch)
        started = time.perf_counter()
        hidden = self.model(ids, positions, cache.attend_prefill([length] * batch), positions.max() + 1).hidden
        self.model.logits(hidden[length - 1 :: length])
        seconds = time.perf_counter() - started
        cache.advance([length] * batch)
        return seconds

    @torch.inference_mode()
    def decode(self, cache: KVCache) -> float:
        """Seconds for one new token of every sequence, the choice of the likeliest included."""
        batch = len(cache.lengths)
        ids = self._ids(batch)
        started = time.perf_counter()
        positions = torch.tensor(cache.lengths)
        cache.start_decode()
        hidden = self.model(ids, positions, cache.attend_decode, positions + 1).hidden
        self.model.logits(hidden).argmax(-1).tolist()
        seconds = time.perf_counter() - started
        cache.advance([1] * batch)
        return seconds


def measure(
    runner: Runner,
    *,
    prefill: int,
    decode: int,
    context: int,
    batch: int = 1,
    repeats: int = 3,
    progress: Callable[[str], Any] = lambda text: None,
) -> dict[str, float]:
    """Tokens a second: medians of `repeats` prefills of `prefill` tokens, and of `decode` steps after `context`."""
    if min(prefill, decode, context, batch, repeats) < 1:
        raise UserError("Prefill, decode, context, batch and repeats must be at least 1.")
    runner.prefill(runner.cache(1, 16), 16)  # the first call of anything is slower
    times = []
    for i in range(repeats):
        progress(f"prefill {i + 1} of {repeats}")
        times.append(runner.prefill(runner.cache(1, prefill), prefill))
    cache = runner.cache(batch, context + decode)
    runner.prefill(cache, context)
    steps = []
    for i in range(decode):
        progress(f"decode {i + 1} of {decode}")
        steps.append(runner.decode(cache))
    return {
        "prefill_tokens_per_second": prefill / statistics.median(times),
        "decode_tokens_per_second": batch / statistics.median(steps),
        "decode_tokens_per_second_best": batch / min(steps),
    }
