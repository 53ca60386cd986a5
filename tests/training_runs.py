"""Small training runs for tests: a configuration file, its texts, and what two equal runs have in common."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configurations import VOCAB_SIZE

WORDS = "the girl saw a red ball and the dog ran to the park where they were happy until it was time to go home".split()

# A run of 12 steps in well under a second. Evaluations and checkpoints fall on different steps.
DEFAULTS: dict[str, dict[str, Any]] = {
    "run": {"output": "out", "seed": 3, "threads": 1, "device": "cpu"},
    "model": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
        "eos_token_id": VOCAB_SIZE - 1,
    },
    "tokenizer": {},
    "data": {
        "train": [{"path": "train.txt", "repeat": 1.5}],
        "valid": [{"path": "valid.txt"}],
        "tokens_folder": "tokens",
        "sequence_length": 16,
    },
    "batch": {"sequences": 2, "accumulation": 2},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"total_tokens": 12 * 64, "warmup_tokens": 32},
    "evaluation": {"every_steps": 4, "windows": 3},
    "checkpoint": {"every_steps": 3, "keep": 2},
}


def text(documents: int, seed: int = 0) -> str:
    """Documents of simple sentences, each line holding a few words, in the corpus format."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(documents):
        for _ in range(3):
            chosen = torch.randint(len(WORDS), (8,), generator=generator).tolist()
            lines.append(" ".join(WORDS[i] for i in chosen) + ".")
        lines.append("<|endoftext|>")
    return "\n".join(lines) + "\n"


def sections(tokenizer: Path | str, /, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`DEFAULTS` with the keys of `changes` replaced in each section; a key set to None is left out."""
    values = copy.deepcopy(DEFAULTS)
    values["tokenizer"]["path"] = str(tokenizer)
    for section, table in changes.items():
        values.setdefault(section, {}).update(table)
    return {name: {k: v for k, v in table.items() if v is not None} for name, table in values.items()}


def write_run(folder: Path, tokenizer: Path | str, /, **changes: dict[str, Any]) -> Path:
    """A folder with two texts and `run.toml`, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(text(24), encoding="utf-8")
    (folder / "valid.txt").write_text(text(8, seed=1), encoding="utf-8")
    path = folder / "run.toml"
    path.write_text(to_toml(sections(tokenizer, **changes)), encoding="utf-8")
    return path


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """TOML of sections with plain values."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


def copy_of(finished: Path, place: Path) -> Path:
    """The inputs of a finished run in another place, under the same folder name."""
    return shutil.copytree(finished.parent, place / finished.parent.name, ignore=shutil.ignore_patterns("out"))


def files(folder: Path) -> list[str]:
    """Names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def at_step(monkeypatch: pytest.MonkeyPatch, loop: Any, step: int, action: Callable[[], object]) -> None:
    """Call `action` in the middle of a step of the module `loop`, counted from 1 in this process."""
    calls, original = iter(range(1, 10**6)), loop.clip_gradients

    def clip(*arguments: Any) -> Any:
        if next(calls) == step:
            action()
        return original(*arguments)

    monkeypatch.setattr(loop, "clip_gradients", clip)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run; anything but strict JSON objects, one a line, is an error."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""  # the last line is whole
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def fixed(record: dict[str, Any]) -> dict[str, Any]:
    """A metrics record without what depends on the clock and the process."""
    measured = {"tokens_per_second", "mfu", "peak_flops", "peak_memory_bytes"}
    return {key: value for key, value in record.items() if key not in measured}


def assert_close_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    """Both runs measured the same but for rounding, and routed the same."""
    assert len(ours) == len(theirs)
    for a, b in zip(map(fixed, ours), map(fixed, theirs), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            exact = key in ("expert_load", "dead_experts")
            least = 2e-5 if key.endswith("_margin") else None  # differences of probabilities, rounded to 1e-5
            assert value == (b[key] if exact else pytest.approx(b[key], rel=tolerance, abs=least)), (key, a["step"])


def assert_same_run(output: Path, reference: Path) -> None:
    """Both runs ended alike, bit for bit: weights, optimizer, counters, best checkpoint, metrics, evaluation."""
    newest = sorted((reference / "checkpoints").iterdir())[-1].name
    ours, theirs = output / "checkpoints" / newest, reference / "checkpoints" / newest
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
        assert (output / "best" / file).read_bytes() == (reference / "best" / file).read_bytes(), file
    a, b = (torch.load(folder / "training_state.pt", weights_only=True) for folder in (ours, theirs))
    assert a["progress"] == b["progress"]
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys() != set()
    for key, values in a["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name]), (key, name)
    assert list(map(fixed, read_metrics(output))) == list(map(fixed, read_metrics(reference)))
    assert (output / "evaluation.json").read_bytes() == (reference / "evaluation.json").read_bytes()
    assert sorted(p.name for p in output.rglob(".*")) == []  # nothing half-written
