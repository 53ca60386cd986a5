"""The metrics.jsonl of a made-up run of 2 layers and 4 experts, for what reads and draws such files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def record(step: int) -> dict[str, object]:
    """A step of 64 tokens, each of which chooses two experts; the last expert of layer 0 takes none."""
    return {
        "step": step, "tokens": 64 * step, "cross_entropy": 3.0 - 0.03 * step, "load_balancing": 1.1, "router_z": 0.5,
        "learning_rate": 1e-3 * step, "grad_norm": 10.0 / step, "max_load_over_mean": 2.0, "tokens_per_second": 1000.0,
        "mfu": 0.25, "peak_flops": 1e11, "peak_memory_bytes": 10**9, "expert_entropy": [0.5, 0.9],
        "dead_experts": [1, 0], "expert_load": [[64, 64 - step, step, 0], [32, 32 + step, 32 - step, 32]],
        "router_margin": [0.2, 0.1], "router_cutoff_margin": [0.02, 0.01 * step],
    }  # fmt: skip


def write_records(folder: Path, steps: int, without: Sequence[str] = ()) -> Path:
    """The folder of a run with so many steps (at most 32), evaluated after every tenth; keys may be left out."""
    lines = []
    for step in range(1, steps + 1):
        lines.append({key: value for key, value in record(step).items() if key not in without})
        if step % 10 == 0 and "held_out_loss" not in without:
            loss = 1.0 + 10 / step
            held_out = {"held_out_loss": {"books": loss}, "bits_per_byte": {"books": loss / 2}}
            lines.append({"step": step, "tokens": 64 * step} | held_out)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder
