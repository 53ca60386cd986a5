"""The memory of a long trace: tokens of the released shapes written, mapped, and measured as `olmoe analyze` does.

    python benchmarks/trace_memory.py [--tokens 10000000] [--layers 16] [--folder DIR]

Routing at random, with ids as frequent as words are. What bounds it from above is the size of the file, which is what
a program takes that reads it whole. Resident memory counts pages of the mapped file as well; RssAnon is without them.
Both are looked at twenty times a second. The file is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from machine import machine

from olmoe.analysis.measurements import measure
from olmoe.runner import Trace, TraceWriter

LIMIT_GB = 3.0
_WINDOW, _DOMAINS = 2048, 8


class Peak(threading.Thread):
    """The most that this process had resident since it was last asked, in GB, with and without pages of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most = {"VmRSS": 0.0, "RssAnon": 0.0}

    def look(self) -> None:
        """Look now."""
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in self._most:
                self._most[name] = max(self._most[name], int(value.split()[0]) * 1024 / 1e9)

    def run(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            time.sleep(0.05)

    def take(self) -> dict[str, float]:
        """What was found, and begin anew."""
        self.look()
        found = {name: round(most, 3) for name, most in self._most.items()}
        self._most = dict.fromkeys(self._most, 0.0)
        return found


def write(path: Path, tokens: int, layers: int, experts: int = 64, top_k: int = 8, vocabulary: int = 50304) -> None:
    """A trace of random windows; a hundred different ones in turn, which metrics cannot tell from new ones."""
    random = np.random.default_rng(0)
    ends = np.linspace(0, tokens, _DOMAINS + 1).astype(int).tolist()
    domains = [[f"domain {i}", ends[i], ends[i + 1]] for i in range(_DOMAINS)]
    windows = []
    for _ in range(100):
        noise = random.gumbel(size=(_WINDOW, layers, experts)) - 0.02 * np.arange(experts)
        chosen = np.argsort(-noise, axis=2)[:, :, :top_k].astype(np.uint8)
        weights = -np.sort(-random.dirichlet(np.ones(experts), (_WINDOW, layers)), axis=2)[:, :, :top_k]
        windows.append((chosen, weights.astype(np.float16)))
    with TraceWriter(
        path,
        layers=layers,
        experts=experts,
        top_k=top_k,
        predictions=True,
        metadata={"domains": json.dumps(domains)},
    ) as writer:
        for number, start in enumerate(range(0, tokens, _WINDOW)):
            count = min(_WINDOW, tokens - start)
            ids = (random.zipf(1.2, (2, count)) - 1) % vocabulary
            chosen, weights = windows[number % len(windows)]
            writer.start()
            writer.append(chosen[:count], weights[:count], ids[0], ids[1])


def main() -> None:
    """Print the size of the file, the peaks, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the trace is written for a while (a temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the JSON line there")
    arguments = parser.parse_args()
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "trace.safetensors"
        started = time.perf_counter()
        write(path, arguments.tokens, arguments.layers)
        written, size = time.perf_counter() - started, path.stat().st_size / 1e9
        print(f"ceiling: the file has {size:.2f} GB; limit {LIMIT_GB} GB")
        writing = peak.take()
        print(f"written in {written:.0f} s with {writing['VmRSS']} GB resident ({writing['RssAnon']} without files)")
        started = time.perf_counter()
        found = measure(Trace.open(path))
        measured = time.perf_counter() - started
        measuring = peak.take()
        print(f"measured in {measured:.0f} s with {measuring['VmRSS']} GB ({measuring['RssAnon']} without files)")
    line = json.dumps(
        {
            "benchmark": "trace_memory",
            "machine": machine(),
            "tokens": found["tokens"],
            "layers": arguments.layers,
            "file_gb": round(size, 3),
            "limit_gb": LIMIT_GB,
            "writing_gb": writing,
            "measuring_gb": measuring,
            "seconds": {"writing": round(written, 1), "measuring": round(measured, 1)},
        }
    )
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
