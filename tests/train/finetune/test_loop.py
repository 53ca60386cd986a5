"""Fine-tuning on several ranks: the results of one process, resuming on another number of ranks, and signals."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetuning_runs import chat, preference, write_run
from olmoe.errors import ConfigError
from olmoe.train.finetune.config import SFTConfig, load_config
from olmoe.train.finetune.sft import sft
from packed_folders import packed_folder
from rank_processes import finetune_run, finetune_until, on_ranks
from sentences import refused
from training_runs import files, fixed, read_metrics

# Seven rows, two a step, so that the second rank's share of the last step is empty.
COMMON = {
    "data": {"packing": False},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"epochs": 1},
    "evaluation": {"every_steps": 3},
    "checkpoint": {"every_steps": 2},
}
ADAPTER = {"rank": 2, "alpha": 8.0}
CASES = {
    "all weights": (
        "sft",
        {"data": {"packing": True}, "schedule": {"epochs": 4}, "loss": {"load_balancing": 0.1, "router_z": 0.01}},
    ),
    "experts across ranks": ("sft", {"parallel": {"expert": 2}, "loss": {"load_balancing": 0.1}}),
    "adapters": ("sft", {"adapter": ADAPTER}),
    "adapters on nf4": ("sft", {"adapter": ADAPTER | {"pack": "nf4"}}),
    "dpo": ("dpo", {}),
    "kto by rmsprop": ("dpo", {"loss": {"kind": "kto"}, "optimizer": {"learning_rate": 1e-3, "kind": "rmsprop"}}),
}


def write(folder: Path, tokenizer: Path, case: str, ranks: int, **changes) -> Path:
    """Write a case's run for this many ranks, with the same steps."""
    command, options = CASES[case]
    batch = {"sequences": 2, "accumulation": 1} if ranks > 1 else {"sequences": 1, "accumulation": 2}
    settings = {
        k: v for k, v in (COMMON | options | {"batch": batch} | changes).items() if ranks > 1 or k != "parallel"
    }
    return write_run(folder, tokenizer, row=preference if command == "dpo" else chat_of, rows=7, **settings)


def chat_of(number: int):
    """Chats of different lengths, the last ones much longer."""
    row = chat(number)
    row["messages"][1]["content"] += " and a dog" * (3 * (number % 4))
    return row


def weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "best").glob("*.safetensors")
    return load_file(file)


def assert_alike(output: Path, reference: Path) -> None:
    """Records, best checkpoint and evaluation are equal up to rounding."""
    ours, theirs = (list(map(fixed, read_metrics(folder))) for folder in (output, reference))
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() - {"answers"}:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-6), (key, a["step"])
    found, expected = weights(output), weights(reference)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    results = [json.loads((folder / "evaluation.json").read_text()) for folder in (output, reference)]
    assert results[0]["step"] == results[1]["step"]
    names = [path.relative_to(output / "best") for path in sorted((output / "best").rglob("*"))]
    assert names == [path.relative_to(reference / "best") for path in sorted((reference / "best").rglob("*"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer_file):
    """The output of one process for a case."""
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            path = write(tmp_path_factory.mktemp("alone") / "run", tokenizer_file, case, 1)
            before = torch.get_num_threads()
            finetune_run(path, CASES[case][0])
            torch.set_num_threads(before)
            made[case] = path.parent / "out"
        return made[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_same_steps_as_one(case, alone, tmp_path, tokenizer_file):
    path = write(tmp_path / "run", tokenizer_file, case, 2)
    on_ranks(2, finetune_run, path, CASES[case][0])
    output = path.parent / "out"
    assert_alike(output, alone(case))
    if CASES[case][0] == "dpo":
        assert np.load(output / "reference.npy") == pytest.approx(np.load(alone(case) / "reference.npy"), abs=1e-5)


@pytest.mark.parametrize("case", ["all weights", "adapters on nf4", "kto by rmsprop"])
def test_a_signal_to_any_rank_stops_all_and_one_process_resumes(case, alone, tmp_path, tokenizer_file):
    command = CASES[case][0]
    path = write(tmp_path / "run", tokenizer_file, case, 2)
    assert on_ranks(2, finetune_until, path, command, 3, 1, signal.SIGTERM) == ["step-0000003"] * 2
    assert not [p for p in path.parent.rglob(".*") if "partial" in p.name]
    finetune_run(write(tmp_path / "run", tokenizer_file, case, 1), command, True)
    assert_alike(path.parent / "out", alone(case))


@pytest.mark.parametrize("case", ["all weights", "adapters"])
def test_ranks_resume_a_run_of_one_process(case, alone, tmp_path, tokenizer_file):
    path = write(tmp_path / "run", tokenizer_file, case, 1)
    assert finetune_until(path, "sft", 3, 0, signal.SIGINT) == "step-0000003"
    write(tmp_path / "run", tokenizer_file, case, 2)
    on_ranks(2, finetune_run, path, "sft", True)
    assert_alike(path.parent / "out", alone(case))


def test_unsupported_settings_for_several_ranks_are_refused(tmp_path, tokenizer_file):
    path = write_run(tmp_path, tokenizer_file, adapter=ADAPTER, parallel={"expert": 2})
    assert "there is an [adapter]" in refused(lambda: load_config(path, SFTConfig), ConfigError)
    path = write_run(tmp_path, tokenizer_file, parallel={"data": 2})
    message = refused(lambda: sft(load_config(path, SFTConfig), show_progress=False), ConfigError)
    assert "--nproc-per-node 2 -m olmoe sft" in message


def test_a_packed_base_model_trains_on_two_ranks(tmp_path, tokenizer_file):
    """Every rank holds all of its weights."""
    packed_folder(tmp_path / "run" / "start", "int4", tokenizer_file, max_position_embeddings=256)
    for ranks in (1, 2):
        shutil.rmtree(tmp_path / "run" / "out", ignore_errors=True)
        path = write(tmp_path / "run", tokenizer_file, "adapters", ranks)
        on_ranks(ranks, finetune_run, path, "sft") if ranks > 1 else finetune_run(path, "sft")
        (tmp_path / "run" / "out").rename(tmp_path / f"out-{ranks}")
    assert "adapter_config.json" in files(tmp_path / "out-2" / "best")
    assert_alike(tmp_path / "out-2", tmp_path / "out-1")
