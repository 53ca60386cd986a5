"""Training of one layer of the released width, forward and backward, against the rate of the machine's fp32 products.

python benchmarks/train_layer.py [--sequences 2] [--length 512]

The ceilings are the fastest products that torch and our own kernels make of matrices of a layer's width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from machine import ceilings, limit_isa, machine

from olmoe.config import ModelConfig
from olmoe.model import CausalLM, causal_attend, initialize
from olmoe.runtime import keep_freed_memory, peak_memory_bytes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", help="limit the instruction set, for example AVX2")
    arguments = parser.parse_args()
    limit_isa(arguments.isa)

    limits = ceilings()
    config = ModelConfig(vocab_size=64, num_hidden_layers=1)
    tokens = arguments.sequences * arguments.length
    embeddings = 2 * config.vocab_size * config.hidden_size
    # Two operations for a weight and a token, forward; twice as many backward. Then queries by keys and by values,
    # of whose pairs causal attention needs half.
    products = 6 * tokens * (config.num_active_parameters - embeddings) / 1e9
    pairs = 6 * tokens * arguments.length * config.hidden_size / 1e9
    print(f"ceilings: {limits}")
    print(f"  {products + pairs:.0f} GFLOP: at least {(products + pairs) / limits['fp32_gflops']:.2f} s", flush=True)

    keep_freed_memory(large=True)
    model = CausalLM(config)
    initialize(model, 0)
    layer, rotary = model.model.layers[0], model.model.rotary
    positions = torch.arange(arguments.length).expand(arguments.sequences, -1)
    x = torch.randn(arguments.sequences, arguments.length, config.hidden_size, requires_grad=True)
    gradient = torch.randn_like(x)
    rope = rotary(positions)

    forward, backward = [], []
    for _ in range(arguments.repeats + 1):
        started = time.perf_counter()
        y, _ = layer(x, rope, causal_attend)
        between = time.perf_counter()
        y.backward(gradient)
        forward.append(between - started)
        backward.append(time.perf_counter() - between)
        model.zero_grad(set_to_none=True)
        x.grad = None
    # The first one faults its memory in.
    seconds = statistics.median(a + b for a, b in zip(forward[1:], backward[1:], strict=True))
    rate = (products + pairs) / seconds
    result = {
        "benchmark": "train_layer",
        "sequences": arguments.sequences,
        "length": arguments.length,
        "forward_s": round(statistics.median(forward[1:]), 3),
        "backward_s": round(statistics.median(backward[1:]), 3),
        "gflops": round(rate, 1),
        "share_of_ceiling": round(rate / limits["fp32_gflops"], 2),
        "share_of_torch_ceiling": round(rate / limits["torch_fp32_gflops"], 2),
        "peak_gb": round(peak_memory_bytes() / 1e9, 2),
    }
    print(f"{rate:.0f} GFLOP/s, {result['share_of_ceiling']} of the ceiling")
    print(json.dumps(result | {"ceilings": limits} | machine()))


if __name__ == "__main__":
    main()
