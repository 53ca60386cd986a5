"""The machine that a measurement was made on, and its memory."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import olmoe
from olmoe.ops import cpu


def reset_peak_memory() -> None:
    """Reset `runtime.peak_memory_bytes` to what is resident now, if the system supports it (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def machine_facts() -> dict[str, Any]:
    """Processor, threads, instruction set, versions, date, and the commit of a checkout."""
    names = [platform.processor() or platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")] or names
    except OSError:
        pass
    facts: dict[str, Any] = {
        "cpu": names[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if cpu.available() else None,
        "versions": {"olmoe": olmoe.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    if (commit := _commit()) is not None:
        facts["commit"] = commit
    return facts


def _commit() -> str | None:
    """The commit that this file belongs to; None for an installed package, even one inside somebody's checkout."""
    here = Path(__file__)
    for command in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "--short", "HEAD")):
        try:
            done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=here.parent, check=False)
        except OSError:
            return None
        if done.returncode != 0:
            return None
    return done.stdout.strip()
