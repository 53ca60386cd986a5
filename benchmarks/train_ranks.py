"""`olmoe train` of the olmoe-tiny shape: two ranks of one thread, split in several ways, against one of two threads.

python benchmarks/train_ranks.py [--ways alone data expert] [--rounds 3] [--steps 12] [--start olmoe-tiny]

Each way is a process, or torchrun, of its own; they take turns. What is compared are the tokens a second of whole steps
as `metrics.jsonl` has them, the first of them left out. An untrained router gives some ranks more rows than others; one
that has learned to balance them is had by `--start`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from machine import machine

from olmoe.io.hub import SHIPPED
from olmoe.weights.sample_text import ASSETS

SEQUENCES, LENGTH = 16, 256
WARM_UP = 3  # steps that are left out

RUN = """
[run]
output = "{output}"
threads = {threads}
device = "cpu"
peak_flops = 1e12
{start}
[model]
vocab_size = 4096
hidden_size = 128
intermediate_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_experts = 64
num_experts_per_tok = 8
max_position_embeddings = 512
eos_token_id = 4095
[tokenizer]
path = "{tokenizer}"
[data]
train = [{{ path = "{text}" }}]
sequence_length = {length}
tokens_folder = "tokens"
[batch]
sequences = {sequences}
accumulation = {accumulation}
[schedule]
total_tokens = {tokens}
[checkpoint]
every_steps = 1000000
[parallel]
{parallel}
[compute]
{compute}
"""


@dataclass(frozen=True)
class Way:
    """How many ranks train, of how many threads each, and the lines of `[parallel]` and `[compute]`."""

    ranks: int
    threads: int
    parallel: str = ""
    compute: str = ""
    accumulation: int = 1
    speeds: list[float] = field(default_factory=list, compare=False)


WAYS = {
    "alone": Way(1, 2),
    "data": Way(2, 1, "data = 2"),
    "expert": Way(2, 1, "expert = 2"),
    "replicate": Way(2, 1, "replicate = 2"),
    "alone, accumulating": Way(1, 2, accumulation=4),
    "data, accumulating": Way(2, 1, "data = 2", accumulation=4),
    "expert, accumulating": Way(2, 1, "expert = 2", accumulation=4),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["alone", "data", "expert"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--start", help="a model of this shape, to begin with its weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name in arguments.ways:
                speeds = run(Path(folder), f"{name} {number}", WAYS[name], arguments.steps, arguments.start)
                WAYS[name].speeds.extend(speeds)
                print(f"{name}: {statistics.median(speeds):.0f} tokens/s", flush=True)
    speed = {name: round(statistics.median(WAYS[name].speeds), 1) for name in arguments.ways}
    first = arguments.ways[0]
    ratios = {f"{name} / {first}": round(speed[name] / speed[first], 3) for name in arguments.ways[1:]}
    print(ratios)
    result = {"benchmark": "train_ranks", "sequences": SEQUENCES, "length": LENGTH, "start": arguments.start}
    result["tokens_per_second"] = speed
    print(json.dumps(result | {"ratios": ratios} | machine() | {"cores": os.cpu_count()}))


def run(folder: Path, name: str, way: Way, steps: int, start: str | None) -> list[float]:
    """Tokens a second of each step after the first ones."""
    config = folder / f"{name}.toml"
    values = {
        "output": folder / name,
        "threads": way.threads,
        "start": f'initialize_from = "{start}"' if start else "",
        "tokenizer": SHIPPED / "tokenizer.json",
        "text": ASSETS / "calibration.txt",
        "length": LENGTH,
        "sequences": SEQUENCES // way.accumulation,
        "accumulation": way.accumulation,
        "tokens": steps * SEQUENCES * LENGTH,
        "parallel": way.parallel,
        "compute": way.compute,
    }
    config.write_text(RUN.format(**values))
    command = ["-m", "olmoe", "train", str(config)]
    if way.ranks > 1:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(way.ranks), *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(way.threads)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [record["tokens_per_second"] for record in records if "tokens_per_second" in record][WARM_UP:]


if __name__ == "__main__":
    main()
