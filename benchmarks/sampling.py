"""The time in which a token is chosen: `ops.sample` on a row of the released vocabulary, by its parameters.

    python benchmarks/sampling.py [--isa avx2] [--rows 1] [--repeats 60]

One thread, unless there are several rows and --threads. The ceiling is what memory allows: a row of logits read once.
Logits have several shapes: peaked as a trained model's, flat (nearly all of the vocabulary within top-p), equal but
for rounding, all the same, and falling by id, which is the worst order for a selection. The call is timed as the
engine makes it, from Python; the greedy choice shows what that costs at least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from machine import ceilings, machine

from olmoe import ops
from olmoe.ops import SamplingRow, cpu
from olmoe.runtime import set_threads

VOCABULARY, ALLOWED = 50304, 50280
LIMIT_MS = 0.3


def shapes() -> dict[str, torch.Tensor]:
    """One row of logits of each kind, (V,)."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(VOCABULARY, generator=generator)
    peaked = 2.5 * normal
    peaked[torch.randperm(ALLOWED, generator=generator)[:6]] = torch.tensor([18.0, 17.0, 16.5, 15.0, 14.0, 13.0])
    return {
        "peaked": peaked,
        "flat": normal,
        "equal": 1e-6 * normal,
        "same": torch.zeros(VOCABULARY),
        "falling": torch.linspace(5.0, -5.0, VOCABULARY),
    }


def combinations() -> dict[str, dict[str, Any]]:
    """The parameters by name: each alone, pairs that are common, and all at once."""
    filters: dict[str, dict[str, Any]] = {
        "top_k=40": {"top_k": 40},
        "top_k=40000": {"top_k": 40000},
        "top_p=0.9": {"top_p": 0.9},
        "top_p=0.99": {"top_p": 0.99},
        "min_p=0.05": {"min_p": 0.05},
    }
    generator = torch.Generator().manual_seed(1)
    ids = array("q", torch.randint(0, ALLOWED, (4096,), generator=generator).tolist())
    scores: dict[str, Any] = {
        "ids": ids,
        "prompt_length": 2048,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "bias_ids": array("q", range(0, 3000, 10)),
        "biases": array("d", [1.5] * 300),
    }
    words = -(-ALLOWED // 32)
    scores["mask"] = torch.randint(-(2**31), 2**31 - 1, (words,), generator=generator, dtype=torch.int32)
    found: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "temperature": {}}
    for count in (1, 2, 3):
        for names in itertools.combinations(filters, count):
            if len({name.split("=")[0] for name in names}) == count:
                found[" ".join(names)] = {key: v for name in names for key, v in filters[name].items()}
    changed = {f"{name} +scores": {**parameters, **scores} for name, parameters in found.items()}
    reported = {f"{name} +logprobs": {**p, "logprobs": 20} for name, p in {**found, **changed}.items()}
    return {**found, **changed, **reported}


def measure(logits: torch.Tensor, rows: list[SamplingRow], repeats: int) -> list[float]:
    """Milliseconds a row, each time with another random number."""
    times = []
    for position in range(repeats + 3):
        for row in rows:
            row.position = position
        started = time.perf_counter()
        ops.sample(logits, rows, ALLOWED, backend="cpu")
        times.append((time.perf_counter() - started) * 1e3 / len(rows))
    return times[3:]


def main() -> None:
    """Print the ceiling, a line for each combination, and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=("avx512", "avx2", "scalar"), help="instruction set of the kernels")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", type=Path, help="also write the JSON line there")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    if arguments.isa:
        cpu.set_isa(arguments.isa)
    read = ceilings()["read_gb_per_s"]
    ceiling = VOCABULARY * 4 / 1e6 / read
    print(f"ceiling: {ceiling:.4f} ms a row ({VOCABULARY * 4 / 1e3:.0f} kB at {read} GB/s); kernels: {cpu.isa()}")
    results: dict[str, dict[str, float]] = {}
    for shape, logits in shapes().items():
        batch = logits.repeat(arguments.rows, 1)
        for name, parameters in combinations().items():
            rows = [SamplingRow(**{"temperature": 2.0, "seed": n} | parameters) for n in range(arguments.rows)]
            times = measure(batch, rows, arguments.repeats)
            median, least = statistics.median(times), min(times)
            results[f"{shape}: {name}"] = {"median_ms": round(median, 4), "min_ms": round(least, 4)}
            print(f"{shape:8} {name:50} {median:.3f} ms (at least {least:.3f})")
    slowest = max(results, key=lambda name: results[name]["median_ms"])
    print(f"slowest: {slowest}, {results[slowest]['median_ms']:.3f} ms a row; limit {LIMIT_MS} ms")
    line = json.dumps(
        {
            "benchmark": "sampling",
            "machine": machine(),
            "isa": cpu.isa(),
            "threads": arguments.threads,
            "rows": arguments.rows,
            "vocabulary": VOCABULARY,
            "repeats": arguments.repeats,
            "ceiling_ms": round(ceiling, 4),
            "slowest": slowest,
            "slowest_median_ms": results[slowest]["median_ms"],
            "limit_ms": LIMIT_MS,
            "results": results,
        }
    )
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
