"""What it costs to record the routing of a prompt: the same prompt with and without a trace, in turn.

    python benchmarks/tracing.py [--layers 16] [--format int4] [--tokens 2048] [--repeats 9] [--decode 64]

Random weights of the released shapes. A traced prompt counts everything: what the kernels write, the conversion to what
the file holds, and the file itself, to its last byte. The ceiling is what memory allows: the bytes of the trace written
once; everything beyond it is overhead. Decoding steps are measured the same way.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import alternate, ceilings, machine

from olmoe.bench.random_models import random_model
from olmoe.config import ModelConfig
from olmoe.ops import cpu
from olmoe.runner import Batch, CacheView, Runner, TraceWriter, Want, make_runner
from olmoe.runtime import set_threads

LIMIT = 0.03  # of the speed of a prompt


def run(runner: Runner, chunks: Sequence[Sequence[int]], view: CacheView, writer: TraceWriter | None) -> None:
    """Parts of a text one after the other; logits of the last token of each, as a text's next token needs them."""
    done = 0
    for ids in chunks:
        want = Want([len(ids) - 1], () if writer is None else range(len(ids)))
        output = runner.forward(Batch(ids, [len(ids)], [done]), view, want)
        done += len(ids)
        if writer is not None and output.trace is not None:
            writer.append(output.trace.expert_ids.numpy(), output.trace.weights.numpy(), ids)


def traced(runner: Runner, chunks: Sequence[Sequence[int]], view: CacheView, path: Path) -> None:
    """`run` with a trace in a file."""
    with TraceWriter.of(runner.config, path) as writer:
        writer.start()
        run(runner, chunks, view, writer)


def main() -> None:
    """Print the ceiling, both speeds of prompts and of decoding, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="steps of decoding")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="also write the JSON line there")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    config = ModelConfig(num_hidden_layers=arguments.layers)
    token_bytes = config.num_hidden_layers * config.num_experts_per_tok * 3 + 4
    limits = ceilings()
    ceiling = arguments.tokens * token_bytes / limits["read_gb_per_s"] / 1e9
    print(f"ceiling: {1e3 * ceiling:.3f} ms for the {token_bytes} bytes of each of {arguments.tokens} tokens; {limits}")
    runner = make_runner(random_model(config, arguments.format))
    numbers = random.Random(1)
    ids = [numbers.randrange(config.vocab_size) for _ in range(arguments.tokens)]
    view = CacheView(runner.new_cache(1, arguments.tokens), np.zeros((1, 1), dtype=np.int32))
    texts = {
        "prompt": [ids[at : at + runner.chunk_tokens] for at in range(0, len(ids), runner.chunk_tokens)],
        "decode": [[token] for token in ids[: arguments.decode]],
    }
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, chunks in texts.items():
            count = sum(map(len, chunks))
            times = alternate(
                {
                    "plain": partial(run, runner, chunks, view, None),
                    "traced": partial(traced, runner, chunks, view, Path(folder) / "trace"),
                },
                arguments.repeats,
            )
            speeds = {way: count / statistics.median(seconds) for way, seconds in times.items()}
            # Each pair ran side by side: what slows both down does not count.
            costs = [b / a - 1 for a, b in zip(times["plain"], times["traced"], strict=True)]
            results[name] = {
                "tokens": count,
                "tokens_per_second": {way: round(speed, 2) for way, speed in speeds.items()},
                "seconds": {way: [round(s, 4) for s in seconds] for way, seconds in times.items()},
                "cost": round(statistics.median(costs), 4),
                "cost_of_best": round(min(times["traced"]) / min(times["plain"]) - 1, 4),
            }
            print(
                f"{name}: {speeds['plain']:.1f} tokens/s, traced {speeds['traced']:.1f}: "
                f"{100 * results[name]['cost']:+.2f} % of the time (best against best "
                f"{100 * results[name]['cost_of_best']:+.2f} %)"
            )
    print(f"limit: {100 * LIMIT:.0f} % of a prompt")
    line = json.dumps(
        {
            "benchmark": "tracing",
            "machine": machine(),
            "isa": cpu.isa(),
            "format": arguments.format,
            "layers": arguments.layers,
            "repeats": arguments.repeats,
            "ceilings": limits,
            "ceiling_ms": round(1e3 * ceiling, 3),
            "limit": LIMIT,
            **results,
        }
    )
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
