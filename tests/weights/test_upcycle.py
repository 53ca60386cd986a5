"""Upcycling: which forms keep the dense function, and what experts and routers are made of."""

import dataclasses

import pytest
import torch

from olmoe.config import ModelConfig
from olmoe.errors import UserError
from olmoe.model import CausalLM, causal_attend, initialize
from olmoe.weights import export
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.source import load_model
from olmoe.weights.upcycle import UpcycledSource, Upcycling

DENSE = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, eos_token_id=60, num_experts=1, num_experts_per_tok=1,
)  # fmt: skip
IDS = torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(5)
    model = CausalLM(DENSE)
    initialize(model, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    export.save(model, tmp_path / "dense")
    return Checkpoint.open(tmp_path / "dense").source()


def logits_of(model):
    with torch.inference_mode():
        return model.logits(model(IDS, torch.arange(30).expand_as(IDS), causal_attend).hidden)


def upcycled(dense, **options):
    return load_model(UpcycledSource(dense, Upcycling(**options)), torch.float32)


@pytest.mark.parametrize(
    "numbers",
    [(8, 2, 1), (8, 8, 1), (16, 4, 2), (24, 12, 4), (1, 1, 1)],
    ids=["copies", "all of them", "halves", "quarters", "dense again"],
)
def test_normalized_keeps_the_function(dense, numbers):
    experts, top_k, split = numbers
    model = upcycled(dense, experts=experts, top_k=top_k, split=split)
    assert model.config.intermediate_size == 48 // split
    torch.testing.assert_close(logits_of(model), logits_of(load_model(dense, torch.float32)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [1, 2])
def test_scaled_keeps_it_nearly_and_plain_does_not(dense, split):
    expected = logits_of(load_model(dense, torch.float32))
    far = {form: (logits_of(upcycled(dense, experts=8, top_k=2, split=split, form=form)) - expected).abs().mean()
           for form in ("scaled", "plain")}  # fmt: skip
    assert far["scaled"] < 0.25 * far["plain"]


def test_the_scale_is_that_of_the_written_router(tmp_path):
    """Computed from it, not from another one of the same distribution: of one channel, routers differ much."""
    config = dataclasses.replace(DENSE, num_hidden_layers=2)
    model = CausalLM(config)
    initialize(model, seed=5)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data = torch.tensor([100.0] + [0.0] * 31)
    export.save(model, tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense").source()
    sparse = UpcycledSource(source, Upcycling(experts=8, top_k=2, form="scaled"))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp"
        rows = sparse.read(f"{name}.gate.weight")[:, :1]
        logits = 100 * rows.T * torch.randn(100_000, 1, generator=torch.Generator().manual_seed(1))
        chosen = float(logits.softmax(-1).topk(2).values.sum(-1).mean())
        factor = sparse.read(f"{name}.experts.down_proj", 3) / source.read(f"{name}.experts.down_proj", 0)
        assert float(factor.median()) == pytest.approx(1 / chosen, rel=0.02)


@pytest.mark.parametrize("numbers", [(8, 2, 1), (8, 1, 1), (64, 8, 2)], ids=["2 of 8", "1 of 8", "8 halves of 64"])
@pytest.mark.parametrize("width", [32, 1024])
def test_scaled_keeps_the_size_of_outputs_whatever_the_width(tmp_path, numbers, width):
    """Router logits grow with it: at 1024 two of eight experts have 0.45, not a quarter."""
    config = dataclasses.replace(DENSE, hidden_size=width, num_hidden_layers=1)
    model = CausalLM(config)
    initialize(model, seed=5)
    generator = torch.Generator().manual_seed(7)
    norm = model.model.layers[0].post_attention_layernorm
    with torch.no_grad():
        norm.weight.copy_(torch.rand(width, generator=generator) + 0.5)
    export.save(model, tmp_path / "dense")
    source = Checkpoint.open(tmp_path / "dense").source()
    experts, top_k, split = numbers
    sparse = upcycled(source, experts=experts, top_k=top_k, split=split, form="scaled")
    with torch.inference_mode():
        x = norm(torch.randn(2000, width, generator=generator))
        whole, parts = (each.model.layers[0].mlp(x)[0] for each in (model, sparse))
    assert float((whole * parts).sum() / whole.square().sum()) == pytest.approx(1, abs=0.03)


def test_plain_is_exact_where_every_expert_is_chosen_and_whole(dense):
    model = upcycled(dense, experts=4, top_k=4, form="plain")  # the probabilities of all sum to 1
    torch.testing.assert_close(logits_of(model), logits_of(load_model(dense, torch.float32)), rtol=1e-4, atol=1e-4)


def test_parts_make_the_whole(dense):
    source = UpcycledSource(dense, Upcycling(experts=8, top_k=4, split=4, form="plain"))
    name = "model.layers.1.mlp.experts"
    gate, up = dense.read(f"{name}.gate_up_proj", 0).chunk(2)
    parts = [source.read(f"{name}.gate_up_proj", e).chunk(2) for e in range(4, 8)]  # the second group
    assert torch.equal(torch.cat([g for g, _ in parts]), gate)
    assert torch.equal(torch.cat([u for _, u in parts]), up)
    downs = [source.read(f"{name}.down_proj", e) for e in range(4, 8)]
    assert torch.equal(torch.cat(downs, dim=1), dense.read(f"{name}.down_proj", 0))
    router = source.read("model.layers.1.mlp.gate.weight")
    assert torch.equal(router[0], router[3])
    assert not torch.equal(router[3], router[4])


def test_noise_touches_its_share(dense):
    name = "model.layers.0.mlp.experts.down_proj"
    plan = Upcycling(experts=4, top_k=2, noise=0.5)
    source, again = UpcycledSource(dense, plan), UpcycledSource(dense, plan)
    first, second = source.read(name, 0), source.read(name, 1)
    changes = first - dense.read(name, 0)
    assert 0.4 < (changes != 0).float().mean() < 0.6
    assert 0.017 < changes[changes != 0].std() < 0.023
    assert not torch.equal(first, second)
    assert torch.equal(again.read(name, 1), second)  # whatever was read before


def test_seeds_make_other_routers(dense):
    routers = [UpcycledSource(dense, Upcycling(seed=s)).read("model.layers.0.mlp.gate.weight") for s in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert 0.015 < routers[0].std() < 0.025


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "exact"}, "no form 'exact'"),
        ({"experts": 4, "top_k": 5}, "cannot choose 5 of 4"),
        ({"split": 0}, "into 0 parts"),
        ({"experts": 8, "top_k": 3, "split": 2}, "top_k 3 is not a multiple of split 2"),
        ({"noise": 1.5}, "noise is a share"),
    ],
)
def test_numbers_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        Upcycling(**options)


def test_a_width_that_does_not_split(dense):
    with pytest.raises(UserError, match="width of 48 cannot be split into 5"):
        UpcycledSource(dense, Upcycling(experts=10, top_k=5, split=5))


def test_a_sparse_model_is_refused(dense, tmp_path):
    sparse = UpcycledSource(dense, Upcycling())
    with pytest.raises(UserError, match="already sparse: it has 8 experts"):
        UpcycledSource(sparse, Upcycling())
