"""Where the time of a step goes: each operation of a decoder layer and the output head, by themselves.

    python benchmarks/op_profile.py [--format int4] [--tokens 1] [--context 64] [--layers 4] [--gigahertz 3.66]

Random weights of the released shapes. An operation runs on one layer after the other, so that weights come from memory
as they do in a step, and each pass has new random experts. `--tokens 1` is a step of decoding after `--context` tokens;
more are a prompt. For each operation: bytes of weights and cache that it reads, operations (2 a weight and token), time
and cycles of all cores (of --gigahertz; by default what the system says, which may not be what they run at).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import limit_isa, machine

from olmoe.bench.ceilings import read_bandwidth
from olmoe.bench.random_models import FORMATS, random_model
from olmoe.config import ModelConfig
from olmoe.ops import cpu
from olmoe.ops.cache import BlockCache, one_block_each
from olmoe.ops.cpu.extension import float_matrix, kernels
from olmoe.runner.base import default_cache_dtype
from olmoe.runner.compile import CompiledLayer, kernel_matrix
from olmoe.runtime import keep_freed_memory, set_threads

PASSES = 15


class Operation(NamedTuple):
    """One kind of work of a layer (or of the model): `run(layer)`, the bytes it reads and what it computes."""

    name: str
    times_a_step: int
    run: Callable[[int], Any]
    megabytes: float
    gigaoperations: float


def size(module: torch.nn.Module, share: float = 1.0) -> float:
    """MB of a module's own parameters."""
    return share * sum(p.numel() * p.element_size() for p in module._parameters.values() if p is not None) / 1e6


def operations(model: Any, tokens: int, context: int) -> list[Operation]:
    """All of them. Each keeps what it points to alive."""
    config: ModelConfig = model.config
    d, e, k, width = config.hidden_size, config.num_experts, config.num_experts_per_tok, config.intermediate_size
    heads, kv_heads, head_dim, layers = config.num_attention_heads, config.kv_heads, config.head_dim, model.model.layers
    module_dtype = model.model.norm.weight.dtype
    cache_dtype = default_cache_dtype(model)
    x, y = torch.randn(tokens, d), torch.empty(tokens, max(d, config.vocab_size))
    q, kv = torch.empty(tokens, d), torch.empty(2, tokens, kv_heads * head_dim)
    cos = sin = torch.ones(tokens, head_dim // 2)
    keys, values = torch.randn(2, len(layers), 1, kv_heads, context + tokens, head_dim).to(cache_dtype)
    prepared = [CompiledLayer(layer) for layer in layers]
    cache = BlockCache(list(keys), list(values))
    outs = [kernel_matrix(layer.self_attn.o_proj, "weight", module_dtype) for layer in layers]
    routers = [float_matrix(layer.mlp.gate.weight) for layer in layers]
    experts = [
        tuple(kernel_matrix(layer.mlp.experts, name, module_dtype) for name in ("gate_up_proj", "down_proj"))
        for layer in layers
    ]
    head, norm = kernel_matrix(model.lm_head, "weight", module_dtype), torch.ones(d)
    logits, weights = torch.randn(tokens, e), torch.full((tokens, k), 1 / e)
    choices = itertools.cycle([torch.rand(tokens, e).topk(k).indices for _ in range(61)])
    chosen = torch.empty(tokens, k, dtype=torch.long)
    call = kernels()

    def attention_inputs(layer: int) -> None:
        prepared[layer].kernel.attention_inputs(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, q.data_ptr(), kv[0].data_ptr(), kv[1].data_ptr()
        )

    def attention(layer: int) -> None:
        inputs = q.data_ptr(), kv[0].data_ptr(), kv[1].data_ptr(), [tokens], [context], one_block_each(1), heads
        call.attention(*inputs, cache.kernel, layer, y.data_ptr())

    def routed(layer: int) -> None:
        gate_up, down = experts[layer]
        ids = next(choices)
        call.moe(
            gate_up, down, e, width, x.data_ptr(), weights.data_ptr(), ids.data_ptr(), tokens, k, y.data_ptr()
        )  # fmt: skip

    attn, mlp = layers[0].self_attn, layers[0].mlp
    projections = [attn.q_proj, attn.k_proj, attn.v_proj]
    used = 1 - (1 - k / e) ** tokens
    cached = 2 * (context + tokens) * kv_heads * head_dim * cache_dtype.itemsize / 1e6
    seen = tokens * (context + (tokens + 1) / 2)  # pairs of tokens
    count = config.num_hidden_layers
    mega = 2 * tokens / 1e9
    return [
        Operation(
            "norm, q, k, v, QK-norm, RoPE", count, attention_inputs, sum(map(size, projections)),
            mega * (d * d + 2 * d * kv_heads * head_dim),
        ),
        Operation("attention over the cache", count, attention, cached, 4 * seen * d / 1e9),
        Operation("o_proj", count, lambda i: call.linear(outs[i], x.data_ptr(), tokens, 0, y.data_ptr()),
                  size(attn.o_proj), mega * d * d),
        Operation("norm", count, lambda i: call.rms_norm(x.data_ptr(), norm.data_ptr(), 1e-5, tokens, d, y.data_ptr()),
                  0.0, 0.0),
        Operation("router", count, lambda i: call.linear(routers[i], x.data_ptr(), tokens, 0, y.data_ptr()),
                  size(mlp.gate), mega * d * e),
        Operation("softmax and top-k", count,
                  lambda i: call.route(logits.data_ptr(), tokens, e, k, False, weights.data_ptr(), chosen.data_ptr()),
                  0.0, 0.0),
        Operation("routed experts", count, routed, size(mlp.experts, used), mega * 3 * d * width * k),
        Operation("output head", 1, lambda i: call.linear(head, x[-1:].data_ptr(), 1, 0, y.data_ptr()),
                  size(model.lm_head), 2 * d * config.vocab_size / 1e9),
    ]  # fmt: skip


def nominal_gigahertz() -> float:
    """What the system says, or nan."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((float(line.split(":")[1]) / 1e3 for line in lines if line.startswith("cpu MHz")), float("nan"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="int4")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4, help="in memory; the step that is added up has 16")
    parser.add_argument("--gigahertz", type=float, default=nominal_gigahertz())
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", help="limit the instruction set, for example AVX2")
    arguments = parser.parse_args()
    if arguments.isa is not None:
        limit_isa(arguments.isa.upper())  # torch's too, which decides what is left to the kernels
        cpu.set_isa(arguments.isa.lower())
    set_threads(arguments.threads)
    keep_freed_memory()
    bandwidth, threads = read_bandwidth() / 1e9, torch.get_num_threads()
    print(f"Memory reads reach {bandwidth:.1f} GB/s with {threads} threads; {arguments.gigahertz:.2f} GHz.")
    model = random_model(dataclasses.replace(ModelConfig(), num_hidden_layers=arguments.layers), arguments.format)
    model.config = ModelConfig()
    context = arguments.context if arguments.tokens == 1 else 0
    rows: list[dict[str, Any]] = []
    all_operations = operations(model, arguments.tokens, context)
    times: dict[str, list[float]] = {operation.name: [] for operation in all_operations}
    with torch.inference_mode():
        for number in range(PASSES + 1):
            for operation in all_operations:
                started = time.perf_counter()
                for layer in range(arguments.layers):
                    operation.run(layer)
                if number:
                    times[operation.name].append((time.perf_counter() - started) / arguments.layers)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    step = sum(seconds[operation.name] * operation.times_a_step for operation in all_operations)
    print(f"{'operation':30} {'MB':>8} {'us':>8} {'GB/s':>6} {'GFLOP/s':>8} {'cycles':>10} {'a byte':>7} {'share':>6}")
    for name, count, _, megabytes, work in all_operations:
        spent = seconds[name]
        cycles = spent * arguments.gigahertz * 1e9 * threads
        row = {
            "operation": name,
            "times_a_step": count,
            "megabytes": round(megabytes, 3),
            "microseconds": round(spent * 1e6, 1),
            "gb_per_s": round(megabytes / 1e3 / spent, 1),
            "gflops": round(work / spent, 1),
            "cycles": round(cycles),
            "cycles_per_byte": round(cycles / megabytes / 1e6, 3) if megabytes else None,
            "share": round(spent * count / step, 4),
        }
        rows.append(row)
        per_byte = "" if row["cycles_per_byte"] is None else f"{row['cycles_per_byte']:.2f}"
        print(
            f"{name:30} {megabytes:8.2f} {spent * 1e6:8.1f} {row['gb_per_s']:6.1f} {row['gflops']:8.1f} "
            f"{row['cycles']:10,} {per_byte:>7} {row['share']:6.1%}"
        )
    bytes_a_step = sum(operation.megabytes * operation.times_a_step for operation in all_operations) / 1e3
    print(f"a step of 16 layers: {step * 1e3:.2f} ms, {bytes_a_step:.3f} GB, {bytes_a_step / step:.1f} GB/s")
    result = {
        "benchmark": "op_profile",
        "format": arguments.format,
        "tokens": arguments.tokens,
        "context": context,
        "isa": cpu.isa(),
        "read_gb_per_s": round(bandwidth, 2),
        "gigahertz": arguments.gigahertz,
        "milliseconds_a_step": round(step * 1e3, 3),
        "operations": rows,
    }
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
