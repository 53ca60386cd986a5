"""The experts of transformers' models: ours behind its experts interface, in turn with its own implementations.

python benchmarks/experts_interface.py [--shape olmoe|mixtral|qwen3] [--tokens 1 32 512] [--dtype float32] [--train]

One experts module of the model's real width is measured (fewer of them with --experts), without the model
around it, for each number of tokens, with one line of JSON. No speed is reported unless all implementations agree on
the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from machine import alternate, ceilings, limit_isa, machine

# (hidden size, expert width, experts, experts per token) of OLMoE-1B-7B, Mixtral-8x7B and Qwen3-30B-A3B.
SHAPES = {"olmoe": (2048, 1024, 64, 8), "mixtral": (4096, 14336, 8, 2), "qwen3": (2048, 768, 128, 8)}
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}
# What batched_mm may copy before it is left out.
MAX_COPY_GB = 0.9


def build(shape: str, experts: int | None, shrink: int, dtype: torch.dtype) -> tuple[Any, int]:
    """transformers' experts module of that shape with random weights, and the experts per token."""
    from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    hidden, width, count, k = SHAPES[shape]
    hidden, width, count = hidden // shrink, width // shrink, experts or count
    if shape == "olmoe":
        kind, config = OlmoeExperts, OlmoeConfig(hidden_size=hidden, intermediate_size=width, num_experts=count)
    elif shape == "mixtral":
        config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=count)
        kind = MixtralExperts
    else:
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=count)
        kind = Qwen3MoeExperts
    module = kind(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module, min(k, count)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe")
    parser.add_argument("--experts", type=int, help="fewer experts than the model has")
    parser.add_argument("--shrink", type=int, default=1, help="divide both widths by this")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--train", action="store_true", help="forward and backward, instead of forward alone")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--implementations", nargs="+", default=["olmoe", "grouped_mm", "batched_mm"])
    parser.add_argument("--isa", help="limit the instruction set, for example AVX2")
    arguments = parser.parse_args()
    limit_isa(arguments.isa)

    import olmoe.hf

    olmoe.hf.register()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    module, k = build(arguments.shape, arguments.experts, arguments.shrink, dtype)
    limits = ceilings()
    print(f"ceilings: {limits}")
    for tokens in arguments.tokens:
        measure(module, k, tokens, arguments, limits)


def measure(module: Any, k: int, tokens: int, arguments: argparse.Namespace, limits: dict[str, float]) -> None:
    """The implementations in turn on `tokens` tokens; prints their floor, the times and one line of JSON."""
    dtype, names = getattr(torch, arguments.dtype), list(arguments.implementations)
    count, _, hidden = module.gate_up_proj.shape
    width = module.down_proj.shape[2]
    x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=arguments.train)
    weights, ids = torch.randn(tokens, count).softmax(-1).topk(k)
    weights = weights.to(dtype)
    operations = 2 * 3 * hidden * width * k * tokens / 1e9 * (3 if arguments.train else 1)
    # Each chosen expert's weights are read at least once a pass.
    touched = 3 * hidden * width * len(ids.unique()) * dtype.itemsize / 1e9
    best = limits["fp32_gflops" if dtype == torch.float32 else "bf16_gflops"]
    floor = round(max(operations / best, touched / limits["read_gb_per_s"]) * 1e3, 2)
    print(
        f"{tokens} tokens: {operations:.1f} GFLOP and {touched:.2f} GB of weights a pass: at least {floor} ms",
        flush=True,
    )
    copied = 3 * hidden * width * k * tokens * dtype.itemsize / 1e9
    if "batched_mm" in names and copied > MAX_COPY_GB:
        print(f"  batched_mm is left out: it would copy {copied:.0f} GB of weights, one set for each routed row")
        names.remove("batched_mm")

    def run(implementation: str) -> torch.Tensor:
        module.config._experts_implementation = implementation
        if not arguments.train:
            with torch.inference_mode():
                return module(x, ids, weights)
        module.zero_grad(set_to_none=True)
        x.grad = None
        out = module(x, ids, weights)
        out.sum().backward()
        return out.detach()

    expected = run("eager").float()
    for name in names:
        error = float((run(name).float() - expected).abs().max() / expected.abs().max())
        assert error < TOLERANCE[arguments.dtype], f"{name} is {error:.1e} off: no speed is reported"
    times = alternate({name: lambda name=name: run(name) for name in names}, arguments.repeats)
    milliseconds = {name: round(statistics.median(values) * 1e3, 3) for name, values in times.items()}
    ours = times[names[0]]
    ratios = {
        f"{name}_over_{names[0]}": round(statistics.median(b / a for a, b in zip(ours, values, strict=True)), 2)
        for name, values in list(times.items())[1:]
    }
    result = {
        "benchmark": "experts_interface", "shape": arguments.shape, "hidden": hidden, "width": width, "experts": count,
        "k": k, "tokens": tokens, "dtype": arguments.dtype, "train": arguments.train, "floor_ms": floor,
    }  # fmt: skip
    print(f"  milliseconds a pass: {milliseconds}; ratios {ratios}")
    print(json.dumps(result | {"ms": milliseconds} | ratios | {"ceilings": limits} | machine()), flush=True)


if __name__ == "__main__":
    main()
