"""`compute.precision = "bf16-products"`: close to fp32, resumed exactly, unchanged by recomputation and ranks."""

from __future__ import annotations

import signal

import pytest
import torch

from olmoe.errors import BackendUnavailableError
from olmoe.model import Experts, Linear
from olmoe.runtime import cpu_multiplies_bf16
from olmoe.train import loop, precision
from olmoe.train.config import load_config
from olmoe.weights import checkpoint
from rank_processes import on_ranks, train_run, train_until
from sentences import refused
from training_runs import assert_same_run, read_metrics, write_run

LOWERED = {"precision": "bf16-products"}


@pytest.fixture(autouse=True)
def instructions(monkeypatch):
    """It computes the same without the instructions, only slowly."""
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)


def losses(output):
    return [record["cross_entropy"] for record in read_metrics(output) if "cross_entropy" in record]


def trained(folder, tokenizer, **changes):
    """The output of a run."""
    train_run(write_run(folder / "run", tokenizer, **changes))
    return folder / "run" / "out"


def test_losses_are_close_to_fp32_and_weights_stay_fp32(tmp_path, tokenizer_file):
    ours = trained(tmp_path / "ours", tokenizer_file, compute=LOWERED)
    theirs = trained(tmp_path / "theirs", tokenizer_file)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-3)
    assert losses(ours) != losses(theirs)
    model = checkpoint.load(ours / "best")
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, parameter.bfloat16().float())


def test_all_weight_products_but_the_routers_are_in_bf16(tmp_path, tokenizer_file):
    config = load_config(write_run(tmp_path, tokenizer_file, compute=LOWERED))
    model = loop._start(config, resumed=False)
    lowered = [m for m in model.modules() if getattr(m, "products", None) is torch.bfloat16]
    assert len(lowered) == 1 + 5 * 2
    assert {type(m) for m in lowered} == {Linear, Experts}


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(tmp_path, tokenizer_file, mode):
    plain = trained(tmp_path / "plain", tokenizer_file, compute=LOWERED)
    again = trained(tmp_path / "again", tokenizer_file, compute=LOWERED | {"activation_checkpointing": mode})
    assert_same_run(again, plain)


def test_a_resumed_run_continues_exactly(tmp_path, tokenizer_file):
    whole = trained(tmp_path / "whole", tokenizer_file, compute=LOWERED)
    path = write_run(tmp_path / "halves" / "run", tokenizer_file, compute=LOWERED)
    train_until(path, 5, 0, signal.SIGINT)
    train_run(path, resume=True)
    assert_same_run(path.parent / "out", whole)


@pytest.mark.skipif(not cpu_multiplies_bf16(), reason="the processes of ranks check for bf16 instructions")
@pytest.mark.parametrize("split", [{"data": 2}, {"expert": 2}])
def test_two_ranks_match_one_process(tmp_path, tokenizer_file, split):
    """Up to nearly equal numbers that round to neighbouring bf16 values."""
    one = trained(tmp_path / "one", tokenizer_file, compute=LOWERED, batch={"sequences": 1, "accumulation": 4})
    path = write_run(tmp_path / "two", tokenizer_file, compute=LOWERED, parallel=split)
    on_ranks(2, train_run, path)
    assert losses(tmp_path / "two" / "out") == pytest.approx(losses(one), rel=1e-3)


def test_a_compiled_run_is_close(tmp_path, tokenizer_file):
    compiled = trained(tmp_path / "compiled", tokenizer_file, compute=LOWERED | {"compile": True})
    assert losses(compiled) == pytest.approx(losses(trained(tmp_path / "eager", tokenizer_file)), rel=2e-3)


def test_bf16_is_refused_where_the_cpu_lacks_the_instructions(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    path = write_run(tmp_path, tokenizer_file, compute=LOWERED)
    told = refused(lambda: loop.train(load_config(path), show_progress=False), BackendUnavailableError)
    assert 'compute.precision = "bf16-products"' in told
    assert "AVX512-BF16" in told
    assert not (tmp_path / "tokens").exists()
