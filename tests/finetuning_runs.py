"""Small fine-tuning runs for tests: a random model with a tokenizer, chats, and a configuration."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from conftest import make_model
from olmoe.train.finetune import loop
from olmoe.train.run import Interrupted
from olmoe.weights import export
from rank_processes import finetune_run
from training_runs import at_step, to_toml

TOPICS = "ball dog girl park day end".split()

# 30 steps in about three seconds; evaluations and checkpoints fall on different steps.
DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {"output": "out", "initialize_from": "start", "seed": 3, "threads": 1, "device": "cpu"},
    "data": {"train": [{"path": "train.jsonl"}], "valid": [{"path": "valid.jsonl"}], "sequence_length": 96},
    "batch": {"sequences": 1, "accumulation": 2},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"epochs": 6},
    "evaluation": {"every_steps": 8, "answers": 1, "answer_tokens": 4},
    "checkpoint": {"every_steps": 5},
}


def chat(number: int) -> dict[str, Any]:
    """A request and an answer that follows from it."""
    topic = TOPICS[number % len(TOPICS)]
    asked = {"role": "user", "content": f"a {topic} " + "and a dog " * (number % 3)}
    return {"messages": [asked, {"role": "assistant", "content": f"The {topic}."}]}


def preference(number: int) -> dict[str, Any]:
    """A request, the answer that is wanted, and another."""
    topic, other = TOPICS[number % len(TOPICS)], TOPICS[(number + 1) % len(TOPICS)]
    return {
        "prompt": [{"role": "user", "content": f"a {topic}"}],
        "chosen": [{"role": "assistant", "content": f"The {topic}."}],
        "rejected": [{"role": "assistant", "content": f"The {other} day."}],
    }


def write_start(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A checkpoint to begin with."""
    model = make_model(max_position_embeddings=256, **changes)
    export.save(model, folder, extra_files={"tokenizer.json": tokenizer.read_text(encoding="utf-8")})
    return folder


def write_run(folder: Path, tokenizer: Path, /, *, row: Any = chat, rows: int = 18, **changes: dict[str, Any]) -> Path:
    """A folder with a model, data and `run.toml`, whose path is returned; changes are as in `training_runs`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "start").is_dir():
        write_start(folder / "start", tokenizer)
    for name, count in (("train.jsonl", rows), ("valid.jsonl", 6)):
        text = "".join(json.dumps(row(number)) + "\n" for number in range(count))
        (folder / name).write_text(text, encoding="utf-8")
    values = copy.deepcopy(DEFAULTS)
    for section, table in changes.items():
        values.setdefault(section, {}).update(table)
    path = folder / "run.toml"
    path.write_text(to_toml(values), encoding="utf-8")
    return path


def run(path: Path, command: str = "sft", *, resume: bool = False) -> Path:
    """Run a configuration's fine-tuning to its end; its output folder."""
    finetune_run(path, command, resume)
    return path.parent / "out"


def interrupt(monkeypatch: pytest.MonkeyPatch, path: Path, command: str = "sft", *, number: int, step: int) -> None:
    """Let a run begin, and a signal end it after so many steps."""
    with monkeypatch.context() as patched:
        at_step(patched, loop, step, lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted):
            run(path, command)
