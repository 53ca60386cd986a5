"""QLoRA of the released shapes: peak memory and speed of `olmoe sft` or `dpo` over a packed folder of random noise.

    python benchmarks/qlora.py [--command sft] [--layers 16] [--ranks 8 16] [--precisions fp32 bf16] [--tokens 512]

Writes the packed folder (3.9 GB for all layers), unless `--folder` exists, and trains adapters of all attention and all
experts in a process of its own for each rank and precision. Peaks are the kernel's (VmHWM), in which pages of the
mapped file count as much as what was allocated; the latter, which alone could not be given back, is said beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from machine import ceilings, machine
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.io import hub
from olmoe.weights.names import parameter_shapes
from olmoe.weights.quantize import quantize
from olmoe.weights.source import texts_of

NOISE = 2**23 - 15  # odd, so that matrices, whose sizes are powers of two, start at different offsets of the block


class RandomWeights:
    """A `WeightSource` of the released shapes: every matrix another part of a block of bf16 noise."""

    def __init__(self, layers: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.path = Path("random")
        self.config = ModelConfig(num_hidden_layers=layers)
        noise = torch.randn(NOISE, generator=generator) * self.config.initializer_range
        self._noise = noise.bfloat16().repeat(2)
        self._shapes = parameter_shapes(self.config)
        self._large = (torch.randn(NOISE, generator=generator)).bfloat16()
        self._start = {name: 7919 * number % NOISE for number, name in enumerate(self._shapes)}

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        shape = self._shapes[parameter]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        shape = shape if expert is None else shape[1:]
        count, start = torch.Size(shape).numel(), (self._start[parameter] + 104729 * (expert or 0)) % NOISE
        if count <= NOISE:
            return self._noise[start : start + count].view(shape)
        # Embeddings are larger, so that tokens stay different through all layers and choose different experts.
        noise = self._large if "embed" in parameter else self._noise[:NOISE]
        return noise.repeat(-(-count // NOISE))[:count].view(shape)

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`: the tokenizer of the model that the package ships."""
        return {n: t for n, t in texts_of(hub.resolve(hub.SHIPPED)).items() if n.startswith("tokenizer")}


def write_run(
    folder: Path,
    start: Path,
    arguments: argparse.Namespace,
    rank: int,
    precision: str,
    same: bool = False,
    command: str = "sft",
) -> Path:
    """A run of a few steps of one row or pair each, the `same` or another, all of it trained; its configuration."""
    words = "once upon a time there was a little dog who liked to play in the park with a red ball and a friend".split()
    rows = []
    for number in range(arguments.steps):
        text = " ".join(words[(i * i if same else number + i * i) % len(words)] for i in range(2 * arguments.tokens))
        if command == "dpo":
            other = " ".join(reversed(text.split()))
            rows.append(json.dumps({"prompt": "Story:", "chosen": " " + text, "rejected": " " + other}))
        else:
            rows.append(json.dumps({"prompt": "Story:", "completion": " " + text}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    targets = '["attention", "experts"]' if arguments.targets == "all" else '["attention"]'
    path = folder / "run.toml"
    path.write_text(
        f"""
recompute = true
[run]
output = "out"
initialize_from = "{start.absolute()}"
device = "cpu"
[data]
train = [{{ path = "rows.jsonl" }}]
sequence_length = {arguments.tokens}
[batch]
sequences = 1
[schedule]
epochs = 1
kind = "constant"
warmup = 0.0
[optimizer]
learning_rate = 1e-4
[adapter]
rank = {rank}
alpha = {2.0 * rank}
targets = {targets}
precision = "{precision}"
"""
    )
    return path


def peaks() -> dict[str, int]:
    """Bytes of this process by /proc: now allocated and mapped, and the most of both together so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {name: found[name] for name in ("VmHWM", "RssAnon", "RssFile")}


def work(config: str, command: str) -> None:
    """Train in this process, and print what it took."""
    from olmoe.train.finetune.config import PreferenceConfig, SFTConfig, load_config
    from olmoe.train.finetune.dpo import dpo
    from olmoe.train.finetune.sft import sft

    most, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            now = peaks()
            most.update({name: max(most[name], now[name]) for name in most})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    if command == "dpo":
        dpo(load_config(config, PreferenceConfig), overwrite=True, show_progress=False)
    else:
        sft(load_config(config, SFTConfig), overwrite=True, show_progress=False)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(json.dumps(most | {"VmHWM": peaks()["VmHWM"], "seconds": round(seconds, 1)}))


def measure(start: Path, arguments: argparse.Namespace, rank: int, precision: str) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=start.parent) as place:
        config = write_run(Path(place), start, arguments, rank, precision, command=arguments.command)
        worker = [sys.executable, __file__, "--worker", str(config), "--command", arguments.command]
        out = subprocess.run(worker, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        records = map(json.loads, (config.parent / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines())
        steps = [record for record in records if "tokens_per_second" in record]
    seconds = [record["step_tokens"] / record["tokens_per_second"] for record in steps]
    later = seconds[1:] or seconds  # the first step reads the file
    result = {
        "rank": rank,
        "precision": precision,
        "peak_gb": round(found["VmHWM"] / 1e9, 2),
        "allocated_gb": round(found["RssAnon"] / 1e9, 2),
        "mapped_gb": round(found["RssFile"] / 1e9, 2),
        "seconds_a_step": round(statistics.median(later), 2),
        "tokens_per_s": round(steps[0]["step_tokens"] / statistics.median(later), 1),
        "seconds_in_all": found["seconds"],
        "losses": [round(record["loss"], 4) for record in steps],
    }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--targets", choices=["all", "attention"], default="all")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--format", choices=["nf4", "nf4-double"], default="nf4")
    parser.add_argument("--folder", type=Path, help="the packed folder; written if it does not exist")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.command)
        return
    limits = ceilings()
    config = ModelConfig(num_hidden_layers=arguments.layers)
    # Forward, once more for attention and two thirds of the experts, and the gradients of activations.
    attention = (
        config.num_hidden_layers * 2 * config.hidden_size * (config.hidden_size + config.kv_heads * config.head_dim)
    )
    experts = config.num_hidden_layers * config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    operations = 2 * (3 * attention + 8 / 3 * experts + 2 * config.vocab_size * config.hidden_size) / 1e9
    print(f"ceilings: {limits}")
    print(
        f"  {operations:.2f} GFLOP a token: at most {limits['fp32_gflops'] / operations:.0f} tokens/s in fp32, "
        f"{limits['bf16_gflops'] / operations:.0f} in bf16",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        folder: Path = arguments.folder or Path(place) / "packed"
        packing = None
        if not folder.is_dir():
            started = time.perf_counter()
            quantize(RandomWeights(arguments.layers), folder, arguments.format)
            packing = round(time.perf_counter() - started, 1)
            print(f"packed in {packing} s: {os.path.getsize(folder / 'model.safetensors') / 1e9:.2f} GB", flush=True)
        runs = [measure(folder, arguments, r, p) for p in arguments.precisions for r in arguments.ranks]
    result = {
        "benchmark": "qlora",
        "command": arguments.command,
        "layers": arguments.layers,
        "format": arguments.format,
        "tokens": arguments.tokens,
    }
    result |= {"targets": arguments.targets, "packing_seconds": packing, "runs": runs, "ceilings": limits}
    print(json.dumps(result | machine()))


if __name__ == "__main__":
    main()
