"""Peak memory and time of loading a checkpoint of released layers: fp32 shards on disk, bf16 in memory.

    python benchmarks/load_memory.py [--layers 2]

The bound is the target model plus one shard; the ceiling of the speed is a plain read of the files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import machine

from olmoe.config import ModelConfig
from olmoe.model import CausalLM
from olmoe.weights import export

SHARD_BYTES = 10**9
CHILD = """
import json, sys, time
import torch
from olmoe.weights import checkpoint
from olmoe.runtime import peak_memory_bytes
before, started = peak_memory_bytes(), time.perf_counter()
model = checkpoint.load(sys.argv[1], dtype=torch.bfloat16)
seconds = time.perf_counter() - started
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": peak_memory_bytes() - before, "model": size, "seconds": seconds}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        model = CausalLM(ModelConfig(num_hidden_layers=arguments.layers)).requires_grad_(False)
        for parameter in model.parameters():
            parameter.fill_(0.5)
        export.save(model, folder, max_shard_bytes=SHARD_BYTES)
        del model
        files = sorted(folder.glob("*.safetensors"))
        started = time.perf_counter()
        for file in files:
            with file.open("rb") as handle:
                while handle.read(2**24):
                    pass
        read = time.perf_counter() - started
        stored, shard = sum(f.stat().st_size for f in files), max(f.stat().st_size for f in files)
        print(f"ceiling: plain read of {stored / 1e9:.2f} GB in {len(files)} shards takes {read:.2f} s")
        done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    bound = result["model"] + shard
    print(
        f"model {result['model'] / 1e9:.2f} GB + largest shard {shard / 1e9:.2f} GB = {bound / 1e9:.2f} GB; "
        f"peak {result['peak'] / 1e9:.2f} GB above the interpreter, {result['seconds']:.2f} s"
    )
    summary = {
        "benchmark": "load_memory",
        "layers": arguments.layers,
        "stored_gb": round(stored / 1e9, 3),
        "model_gb": round(result["model"] / 1e9, 3),
        "largest_shard_gb": round(shard / 1e9, 3),
        "peak_gb": round(result["peak"] / 1e9, 3),
        "within_bound": result["peak"] <= bound,
        "seconds": round(result["seconds"], 2),
        "plain_read_seconds": round(read, 2),
    }
    print(json.dumps(summary | machine()))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
