"""`[compute]` of fine-tuning: close to fp32 in bf16, unchanged by recomputation, resumed exactly."""

from __future__ import annotations

import signal

import pytest
import torch

from finetuning_runs import preference, run, write_run
from olmoe.errors import BackendUnavailableError
from olmoe.train import precision
from olmoe.train.finetune import loop
from olmoe.weights import checkpoint
from rank_processes import finetune_run, finetune_until, on_ranks
from sentences import refused
from training_runs import assert_same_run, copy_of, fixed, read_metrics

SHORT = {"schedule": {"epochs": 2}, "optimizer": {"learning_rate": 1e-3}}
ROWS = {"sft": {}, "dpo": {"row": preference}}


@pytest.fixture(autouse=True)
def instructions(monkeypatch):
    """bf16 products compute the same without the instructions, only slowly."""
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)


def losses(output):
    return [record["loss"] for record in read_metrics(output) if "loss" in record]


@pytest.fixture(scope="module")
def references(tmp_path_factory, tokenizer_file):
    """fp32 runs by command."""
    folder = tmp_path_factory.mktemp("references")
    return {c: run(write_run(folder / c / "run", tokenizer_file, **rows, **SHORT), c) for c, rows in ROWS.items()}


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("products", ["bf16", "bf16-products"])
def test_losses_are_close_to_fp32_and_weights_stay_fp32(tmp_path, tokenizer_file, references, command, products):
    path = write_run(tmp_path, tokenizer_file, compute={"precision": products}, **ROWS[command], **SHORT)
    output = run(path, command)
    # Preference losses depend on differences of log-probabilities that are as small as bf16's rounding.
    near = {"sft": 1e-2, "dpo": 5e-2}[command]
    assert losses(output) == pytest.approx(losses(references[command]), rel=near)
    assert losses(output) != losses(references[command])
    model = checkpoint.load(output / "best")
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize("products", ["bf16", "bf16-products"])
def test_an_interrupted_run_continues_exactly(tmp_path, tokenizer_file, products):
    whole = run(write_run(tmp_path / "whole", tokenizer_file, compute={"precision": products}, **SHORT))
    path = copy_of(whole, tmp_path / "parts") / "run.toml"
    finetune_until(path, "sft", 5, 0, signal.SIGINT)
    output = run(path, resume=True)
    if products == "bf16-products":
        assert_same_run(output, whole)
    else:  # whose checkpoints are shards
        assert list(map(fixed, read_metrics(output))) == list(map(fixed, read_metrics(whole)))


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing(tmp_path, tokenizer_file, references, command, mode):
    compute = {"activation_checkpointing": mode}
    output = run(write_run(tmp_path / "run", tokenizer_file, compute=compute, **ROWS[command], **SHORT), command)
    assert list(map(fixed, read_metrics(output))) == list(map(fixed, read_metrics(references[command])))


@pytest.mark.parametrize("pack", [None, "nf4"])
def test_recomputation_changes_nothing_for_adapters(tmp_path, tokenizer_file, pack):
    adapter = {"rank": 2, "alpha": 8.0} | ({"pack": pack} if pack else {})
    outputs = [
        run(
            write_run(
                tmp_path / m / "run", tokenizer_file, adapter=adapter, compute={"activation_checkpointing": m}, **SHORT
            )
        )
        for m in ("off", "full")
    ]
    records = [list(map(fixed, read_metrics(output))) for output in outputs]
    assert records[0] == records[1]


def test_two_ranks_in_bf16_match_one_process(tmp_path, tokenizer_file):
    """Up to nearly equal numbers that round to neighbouring bf16 values."""
    compute = {"precision": "bf16"}
    one = run(write_run(tmp_path / "1", tokenizer_file, compute=compute, **SHORT))
    path = write_run(
        tmp_path / "2", tokenizer_file, compute=compute, batch={"sequences": 2, "accumulation": 1}, **SHORT
    )
    on_ranks(2, finetune_run, path, "sft")
    assert losses(path.parent / "out") == pytest.approx(losses(one), rel=1e-2)


def test_the_best_checkpoint_is_evaluated_in_fp32(tmp_path, tokenizer_file, monkeypatch):
    seen = []
    original = loop._report_best

    def report(model_run):
        best = original(model_run)
        seen.append({m.products for m in model_run.model.modules() if hasattr(m, "products")})
        return best

    monkeypatch.setattr(loop, "_report_best", report)
    run(write_run(tmp_path, tokenizer_file, compute={"precision": "bf16-products"}, schedule={"epochs": 0.2}))
    assert seen == [{None}]


def test_bf16_is_refused_where_the_cpu_lacks_the_instructions(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    path = write_run(tmp_path, tokenizer_file, compute={"precision": "bf16-products"})
    assert "AVX512-BF16" in refused(lambda: run(path), BackendUnavailableError)
