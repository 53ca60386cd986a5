"""Activation checkpointing and per-layer compilation in one process: the same numbers, less memory or time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from olmoe.model import CausalLM, causal_attend, initialize, set_products
from olmoe.ops.cpu import causal, extension, training
from olmoe.train import parallel
from olmoe.train.config import LossConfig, load_config
from olmoe.train.losses import objective
from rank_processes import on_ranks, train_run
from training_runs import assert_close_records, fixed, read_metrics, write_run

SHORT = {"schedule": {"total_tokens": 3 * 64, "warmup_tokens": 32}}


def run(folder: Path, tokenizer: Path, **compute) -> list[dict]:
    path = write_run(folder / "run", tokenizer, compute=compute, regularization={"residual_dropout": 0.1}, **SHORT)
    train_run(path)
    return [fixed(record) for record in read_metrics(folder / "run" / "out")]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_changes_no_bit_of_a_run(tmp_path, tokenizer_file, mode):
    plain = run(tmp_path / "plain", tokenizer_file)
    assert run(tmp_path / mode, tokenizer_file, activation_checkpointing=mode) == plain


def kept_bytes(path: Path, **compute) -> int:
    """Bytes of activations that a forward pass saves for backward."""
    config = load_config(write_run(path, "tokenizer.json", compute=compute))
    model = CausalLM(config.model)
    initialize(model, 1)
    for layer in model.model.layers:
        parallel.arrange(layer, config)
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(model, torch.randint(300, (4, 32)), LossConfig(), 128, 1)
    assert loss.objective.requires_grad
    return sum(kept.values())


def test_recomputed_activations_are_not_saved(tmp_path):
    plain, full = (kept_bytes(tmp_path / mode, activation_checkpointing=mode) for mode in ("off", "full"))
    assert full < plain / 2


class Counting(TorchDispatchMode):
    """Counts the operations with a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.name in str(func)
        return func(*args, **(kwargs or {}))


def calls(folder: Path, mode: str, operation: str) -> int:
    """How often an operation runs in the forward and backward passes of two layers."""
    config = load_config(write_run(folder, "tokenizer.json", compute={"activation_checkpointing": mode}))
    model = CausalLM(config.model)
    initialize(model, 1)
    for layer in model.model.layers:
        parallel.arrange(layer, config)
    with Counting(operation) as counting:
        objective(model, torch.arange(128).view(4, 32), LossConfig(), 128, 1).objective.backward()
    return counting.count


@pytest.mark.parametrize(
    ("operation", "once"), [("flash_attention_for_cpu.default", 2), ("aten._grouped_mm.default", 4)]
)
def test_selective_recomputation_does_not_repeat_attention_or_products(tmp_path, operation, once):
    found = {mode: calls(tmp_path, mode, operation) for mode in ("off", "selective", "full")}
    assert found["off"] >= once  # backward also has products of its own
    assert found["selective"] == found["off"]
    assert found["full"] == found["off"] + once


@pytest.mark.skipif(not extension.available() or extension.isa() == "scalar", reason="torch computes attention")
@pytest.mark.parametrize("lowered", [False, True], ids=["fp32", "bf16-products"])
def test_selective_recomputation_does_not_repeat_the_kernels_attention(tmp_path, lowered, monkeypatch):
    if lowered and not extension.kernels().has_bf16_products():
        pytest.skip("this CPU has no instruction for products in bf16")
    counted, kernels = [], training.shared_kernels()

    class Counted:
        def __getattr__(self, name):
            counted.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(causal, "shared_kernels", Counted)
    found = {}
    for mode in ("off", "selective", "full"):
        config = load_config(write_run(tmp_path / mode, "tokenizer.json", compute={"activation_checkpointing": mode}))
        model = CausalLM(config.model)
        initialize(model, 1)
        set_products(model, torch.bfloat16 if lowered else None)
        for layer in model.model.layers:
            parallel.arrange(layer, config)
        counted.clear()
        objective(model, torch.arange(128).view(4, 32), LossConfig(), 128, 1).objective.backward()
        assert counted.count("causal_backward") == 2
        found[mode] = counted.count("causal_forward"), [p.grad for p in model.parameters()]
    assert {mode: calls for mode, (calls, _) in found.items()} == {"off": 2, "selective": 2, "full": 4}
    for _, gradients in found.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, found["off"][1], strict=True))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gates_are_recomputed_in_both_modes(tmp_path, mode):
    assert calls(tmp_path, mode, "aten.silu.default") > calls(tmp_path, "off", "aten.silu.default")


def test_evaluation_recomputes_nothing(tmp_path):
    config = load_config(write_run(tmp_path, "tokenizer.json", compute={"activation_checkpointing": "full"}))
    model = CausalLM(config.model)
    for layer in model.model.layers:
        parallel.arrange(layer, config)
    ids = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        assert model(ids, ids, causal_attend).hidden.shape == (1, 8, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "split"), [(1, {}), (2, {}), (2, {"expert": 2})], ids=["alone", "data 2", "expert 2"]
)
def test_compiled_layers_compute_the_same(tmp_path, tokenizer_file, ranks, split):
    outputs = []
    for name, compute in (("plain", {}), ("compiled", {"compile": True, "activation_checkpointing": "full"})):
        path = write_run(tmp_path / name / "run", tokenizer_file, compute=compute, parallel=split, **SHORT)
        on_ranks(ranks, train_run, path) if ranks > 1 else train_run(path)
        outputs.append(tmp_path / name / "run" / "out")
    assert_close_records(*map(read_metrics, outputs), 1e-5)
