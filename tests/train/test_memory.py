"""The estimated memory of a step against what small models really hold."""

from __future__ import annotations

import pytest
import torch

from configurations import VOCAB_SIZE, small_config
from olmoe import adapters
from olmoe.model import CausalLM, initialize, set_backend
from olmoe.quant import PackedModule
from olmoe.train import recompute as recomputing
from olmoe.train.config import LossConfig, OptimizerConfig
from olmoe.train.losses import objective
from olmoe.train.memory import activations, memory
from olmoe.train.optim import build_optimizer
from olmoe.weights import export
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.frozen import load_frozen

TARGETS = ("attention", "experts")
TOKENS = 256


def make(tmp_path, rank=None, pack=None, frozen=False, **changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_experts": 8}
    config = small_config(**shape | {"max_position_embeddings": 512} | changes)
    model = CausalLM(config)
    initialize(model, 0)
    if frozen or pack is not None:
        export.save(model, tmp_path / "model", dtype=torch.bfloat16 if frozen else torch.float32)
        model = load_frozen(Checkpoint.open(tmp_path / "model").source(), pack)
    if rank is not None:
        adapters.adapt(model, adapters.new_adapter(config, rank, 8.0, TARGETS, 0))
        set_backend(model, "torch")
    return model.train()


def step(model, tokens=TOKENS):
    windows = torch.randint(0, VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(0))
    return objective(model, windows, LossConfig(), positions_in_step=tokens, microbatches=1).objective


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_bytes(model):
    """Bytes that autograd saves in a forward pass, every storage counted once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize(
    ("rank", "pack", "frozen"),
    [(None, None, False), (4, None, False), (4, None, True), (4, "nf4", False), (4, "nf4", True), (4, "int8", True)],
)
def test_weights_gradients_and_moments_match_a_step(tmp_path, rank, pack, frozen):
    model = make(tmp_path, rank, pack, frozen)
    found = memory(model.config, TOKENS, adapter_rank=rank, pack=pack, frozen_bytes=2 if frozen else 4)
    assert found.weights == bytes_of(model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(torch.nn.ParameterList(trained), OptimizerConfig())
    step(model).backward()
    optimizer.step()
    assert found.gradients == bytes_of(p.grad for p in trained)
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert found.optimizer == bytes_of(moments)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations
    assert (pack is None) == (not any(isinstance(module, PackedModule) for module in model.modules()))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts_per_tok": 4}, {"intermediate_size": 96}, {"num_key_value_heads": 2}, {"num_hidden_layers": 4}],
    ids=str,
)
@pytest.mark.parametrize("rank", [None, 4])
def test_activations_match_what_autograd_saves(tmp_path, rank, changes):
    model = make(tmp_path, rank, **changes)
    assert activations(model.config, TOKENS, rank) == pytest.approx(saved_bytes(model), rel=0.03)


def test_recomputation_saves_only_the_inputs_of_layers(tmp_path):
    model = make(tmp_path, num_hidden_layers=4)
    plain = activations(model.config, TOKENS) - activations(model.config, TOKENS, recompute=True)
    for layer in model.model.layers:
        recomputing.wrap(layer, "full")
    # After the forward pass no layer's activations are held, not even those that backward needs first.
    shorter = make(tmp_path, num_hidden_layers=1)
    one = activations(shorter.config, TOKENS) - activations(shorter.config, TOKENS, recompute=True)
    assert one == 0
    kept = saved_bytes(model)
    assert activations(model.config, TOKENS) - kept == pytest.approx(plain * 4 / 3, rel=0.05)


def test_all_but_packed_weights_are_sharded_over_ranks():
    config = small_config(hidden_size=64, intermediate_size=32, num_experts=8)
    alone, four = (memory(config, TOKENS, ranks=ranks) for ranks in (1, 4))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(four, part) == getattr(alone, part) // 4
    assert four.gathered > alone.gathered == 0
    packed, shared = (memory(config, TOKENS, ranks=ranks, adapter_rank=4, pack="int8") for ranks in (1, 4))
    assert packed.weights / 2 < shared.weights < packed.weights
    assert shared.optimizer == packed.optimizer // 4
