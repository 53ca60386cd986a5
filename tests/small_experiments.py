"""Small experiments for tests: a shared configuration, its texts, and arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training_runs import DEFAULTS, sections, to_toml, write_run

TOKENS = DEFAULTS["schedule"]["total_tokens"]
DENSE = {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 16}
# Two arms that differ in what they learn, so that no two runs of different arms or seeds can be mistaken.
ARMS: dict[str, dict[str, Any]] = {"dense": {"model": DENSE}, "sparse": {}}


def write_experiment(folder: Path, tokenizer: Path | str, arms: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with two texts, `base.toml` and `small.toml`, whose path is returned; `changes` are those of a run."""
    run = {"output": "runs"} | changes.pop("run", {})
    write_run(folder, tokenizer)
    (folder / "run.toml").unlink()
    (folder / "base.toml").write_text(to_toml(sections(tokenizer, run=run, **changes)), encoding="utf-8")
    path = folder / "small.toml"
    lines = ['title = "Small"', 'question = "Is it?"', 'base = "base.toml"']
    for name, arm in (ARMS if arms is None else arms).items():
        lines += [f"[arms.{json.dumps(name)}]", *(f"{key} = {_value(value)}" for key, value in arm.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(v)}" for key, v in value.items()) + " }"
    return json.dumps(value)
