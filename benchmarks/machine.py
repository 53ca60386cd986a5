"""What every benchmark reports about the machine, and the ceilings that it measures first."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Clock = Callable[[], float]


def quickest(function: Callable[[], Any], repeats: int = 20, clock: Clock = time.perf_counter) -> float:
    """The shortest time of `function` after one warm-up: for ceilings, below which a shared machine's median falls."""
    function()
    times = []
    for _ in range(repeats):
        started = clock()
        function()
        times.append(clock() - started)
    return min(times)


def alternate(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Times of several functions run in turn, after one warm-up each."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = clock()
            function()
            times[name].append(clock() - started)
    return times


def ceilings(clock: Clock = time.perf_counter) -> dict[str, float]:
    """Matrix products in GFLOP/s and plain memory reads in GB/s, the best that torch gets here, or our own kernels.

    torch's library multiplies fp32 with half the width of some processors' vectors.
    """
    from olmoe import ops

    a, b = torch.randn(512, 2048), torch.randn(2048, 2048)
    operations = 2 * 512 * 2048 * 2048 / 1e9
    a_half, b_half = a.bfloat16(), b.bfloat16()
    big = torch.randn(2**28 // 4 * 4)  # 1 GiB, far beyond every cache
    trained = b.clone().requires_grad_()
    torch_rate = operations / quickest(lambda: a @ b.T, clock=clock)
    our_rate = operations / quickest(lambda: ops.linear(a, trained), clock=clock)
    return {
        "fp32_gflops": round(max(torch_rate, our_rate), 1),
        "torch_fp32_gflops": round(torch_rate, 1),
        "bf16_gflops": round(operations / quickest(lambda: a_half @ b_half.T, clock=clock), 1),
        "read_gb_per_s": round(big.numel() * 4 / 1e9 / quickest(big.sum, clock=clock), 1),
    }


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    import transformers

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", "none"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_seconds(process: int) -> float:
    """What the threads of a process have computed so far."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """What all cores have computed so far, for whomever."""
    fields = [int(f) for f in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def limit_isa(isa: str | None) -> None:
    """Restart this program with torch's libraries limited to `isa` (AVX2), as on a CPU that has no more.

    torch itself hands bf16 products to oneDNN only on CPUs with AVX-512 and uses its own loops elsewhere;
    turning oneDNN off in torch gives what such a CPU gets.
    """
    import sys

    if not isa:
        return
    if os.environ.get("ONEDNN_MAX_CPU_ISA") != isa:
        limits = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": isa.lower(), "MKL_ENABLE_INSTRUCTIONS": isa}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)
    torch.backends.mkldnn.set_flags(False)
