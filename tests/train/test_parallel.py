"""Training on several ranks equals one process in losses, norms, evaluations and weights, for every split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from olmoe.errors import ConfigError
from olmoe.train import one_machine, parallel
from olmoe.train.config import load_config
from olmoe.train.ranks import Ranks
from olmoe.weights import checkpoint, export
from rank_processes import on_ranks, train_run
from sentences import refused
from training_runs import assert_close_records, read_metrics, write_run

STEPS = 5
WINDOWS = 8  # per step; one for each rank and microbatch
SHORT = {
    "schedule": {"total_tokens": STEPS * WINDOWS * 16, "warmup_tokens": 32},
    "evaluation": {"every_steps": 3, "windows": 5},
    "checkpoint": {"every_steps": 4},
}
# Ranks, [parallel], [compute], and why the case is there.
WAYS = {
    "data 2": (2, {}, {}),
    "data 4, recompute all": (4, {"data": 4}, {"activation_checkpointing": "full"}),
    "expert 2, recompute some": (2, {"expert": 2}, {"activation_checkpointing": "selective"}),
    "data 2 x expert 2": (4, {"data": 2, "expert": 2}, {}),
    "replicate 2": (2, {"replicate": 2}, {}),
    "replicate 2 of expert 2, recompute all": (
        4, {"replicate": 2, "expert": 2}, {"activation_checkpointing": "full"},
    ),
    "expert 4": (4, {"data": 1, "expert": 4}, {}),
}  # fmt: skip


def batch(ranks: int) -> dict[str, int]:
    """The same windows per step for this many ranks, one for each rank and microbatch."""
    return {"sequences": ranks, "accumulation": WINDOWS // ranks}


def write(folder: Path, tokenizer: Path, ranks: int, **changes) -> Path:
    return write_run(folder / "run", tokenizer, batch=batch(ranks), **(SHORT | changes))


def assert_equal_runs(output: Path, reference: Path, tolerance: float = 3e-6) -> None:
    """Both runs are equal up to rounding."""
    assert_close_records(read_metrics(output), read_metrics(reference), tolerance)
    ours, theirs = checkpoint.load(output / "best"), checkpoint.load(reference / "best")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (json.loads((o / "evaluation.json").read_text()) for o in (output, reference))
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=tolerance)
    assert ours["expert_load_LE"] == theirs["expert_load_LE"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer_file) -> Path:
    """The output of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train_run(write(folder, tokenizer_file, 1))
    return folder / "run" / "out"


@pytest.mark.parametrize("way", WAYS)
def test_ranks_match_one_process(way, tmp_path, tokenizer_file, alone):
    ranks, split, compute = WAYS[way]
    path = write(tmp_path, tokenizer_file, ranks, parallel=split, compute=compute)
    on_ranks(ranks, train_run, path)
    assert_equal_runs(tmp_path / "run" / "out", alone)
    saved = sorted((tmp_path / "run" / "out" / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-0000004", "step-0000005"]
    model = checkpoint.load(saved[-1])  # of shards
    best = checkpoint.load(alone.parent / "out" / "checkpoints" / "step-0000005")
    for a, b in zip(model.parameters(), best.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def train_apart(path: Path) -> None:
    """Train on ranks without shared memory, as on several machines."""
    one_machine.FOLDER = Path("nowhere")
    train_run(path)


@pytest.mark.parametrize("split", [{"expert": 2}, {"data": 2}], ids=str)
def test_ranks_without_shared_memory_match_one_process(split, tmp_path, tokenizer_file, alone):
    on_ranks(2, train_apart, write(tmp_path, tokenizer_file, 2, parallel=split))
    assert_equal_runs(tmp_path / "run" / "out", alone)


def test_all_tokens_may_choose_the_experts_of_one_rank(tmp_path, tokenizer_file, alone):
    start = checkpoint.load(alone / "best")
    with torch.no_grad():
        start.model.embed_tokens.weight[:, 0] = 1.0  # a component that every token shares
        for layer in start.model.layers:
            layer.mlp.gate.weight[:, 0] = torch.tensor([2.0, 2.0, -2.0, -2.0])
    export.save(start, tmp_path / "start")
    outputs = []
    for ranks, split in ((1, {}), (2, {"expert": 2})):
        folder = tmp_path / str(ranks)
        changes = {"run": {"initialize_from": str(tmp_path / "start")}, "optimizer": {"learning_rate": 1e-3}}
        path = write(folder, tokenizer_file, ranks, parallel=split, **changes)
        on_ranks(ranks, train_run, path) if ranks > 1 else train_run(path)
        outputs.append(folder / "run" / "out")
    loads = json.loads((outputs[0] / "evaluation.json").read_text())["expert_load_LE"]
    for load_LE in loads.values():
        assert [layer[2:] for layer in load_LE] == [[0, 0], [0, 0]]
    assert_equal_runs(outputs[1], outputs[0])


def test_ranks_match_one_process_on_isolated_documents(tmp_path, tokenizer_file, alone):
    data = {"document_mask": True, "mask_repetitions": 2, "train": [{"path": "train.txt", "weight": 1.0}]}
    for ranks, split in ((1, {}), (2, {"expert": 2})):
        path = write(tmp_path / str(ranks), tokenizer_file, ranks, parallel=split, data=data)
        on_ranks(ranks, train_run, path) if ranks > 1 else train_run(path)
    assert_equal_runs(tmp_path / "2" / "run" / "out", tmp_path / "1" / "run" / "out")
    assert read_metrics(tmp_path / "1" / "run" / "out")[0] != read_metrics(alone)[0]


def test_balance_over_all_ranks_matches_one_process_with_the_same_microbatches(tmp_path, tokenizer_file):
    for ranks in (1, 2):
        folder = tmp_path / str(ranks) / "run"
        path = write_run(
            folder, tokenizer_file, batch={"sequences": 4, "accumulation": 2}, parallel={"balance": "all"}, **SHORT
        )
        on_ranks(ranks, train_run, path) if ranks > 1 else train_run(path)
    assert_equal_runs(tmp_path / "2" / "run" / "out", tmp_path / "1" / "run" / "out")


def test_dropout_and_recomputation_on_ranks_match_one_process(tmp_path, tokenizer_file):
    changes = {"regularization": {"residual_dropout": 0.2}}
    train_run(write(tmp_path / "1", tokenizer_file, 1, **changes))
    path = write(tmp_path / "2", tokenizer_file, 2, compute={"activation_checkpointing": "full"}, **changes)
    on_ranks(2, train_run, path)
    assert_equal_runs(tmp_path / "2" / "run" / "out", tmp_path / "1" / "run" / "out")


def test_shards_may_be_unequal_and_embeddings_tied(tmp_path, tokenizer_file):
    """16 and 320 rows on three ranks, and a stack of 4 experts."""
    for ranks in (1, 3):
        changes = SHORT | {"model": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1}}
        batch = {"sequences": ranks, "accumulation": 6 // ranks}
        path = write_run(tmp_path / str(ranks) / "run", tokenizer_file, batch=batch, **changes)
        on_ranks(ranks, train_run, path) if ranks > 1 else train_run(path)
    assert_equal_runs(tmp_path / "3" / "run" / "out", tmp_path / "1" / "run" / "out")
    saved = sorted((tmp_path / "3" / "run" / "out" / "checkpoints").iterdir())[-1]
    model, best = checkpoint.load(saved), checkpoint.load(tmp_path / "3" / "run" / "out" / "best")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(a.shape == b.shape for a, b in zip(model.parameters(), best.parameters(), strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_products_keep_fp32_weights_and_a_close_loss(tmp_path, tokenizer_file, alone, ranks):
    path = write(tmp_path, tokenizer_file, ranks, parallel={"expert": ranks}, compute={"precision": "bf16"})
    on_ranks(ranks, train_run, path) if ranks > 1 else train_run(path)
    ours, theirs = (read_metrics(o) for o in (tmp_path / "run" / "out", alone))
    losses = [[r["cross_entropy"] for r in records if "cross_entropy" in r] for records in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0] != losses[1]
    model = checkpoint.load(tmp_path / "run" / "out" / "checkpoints" / "step-0000005")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(model.lm_head.weight, model.lm_head.weight.bfloat16().float())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("ranks", "split", "told"),
    [
        (2, {"data": 2, "expert": 2}, "data = 2 x expert = 2 is for 4 processes, but there are 2"),
        (1, {"expert": 4}, "--nproc-per-node 4"),
        (4, {"replicate": 3}, "parallel.replicate 3 must divide"),
        (3, {}, "batch.sequences 4"),
        (4, {"expert": 4, "data": 1}, None),
    ],
)
def test_a_split_must_fit_ranks_batch_and_model(tmp_path, tokenizer_file, ranks, split, told):
    config = load_config(write_run(tmp_path, tokenizer_file, batch={"sequences": 4}, parallel=split))
    if told is None:
        parallel.check(config, Ranks(size=ranks))
    else:
        assert told in refused(lambda: parallel.check(config, Ranks(size=ranks)), ConfigError)


def test_experts_must_divide_evenly_among_ranks(tmp_path, tokenizer_file):
    config = load_config(write_run(tmp_path, tokenizer_file, batch={"sequences": 3}, parallel={"expert": 3}))
    assert "parallel.expert 3 must divide the 4 experts" in refused(
        lambda: parallel.check(config, Ranks(size=3)), ConfigError
    )
