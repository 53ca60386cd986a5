"""Routing as data, alike on the kernels and on torch; and what a cache is held in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import make_model
from olmoe.errors import UserError
from olmoe.runner import (
    Batch,
    CacheView,
    CpuRunner,
    RouterPolicy,
    TorchRunner,
    Want,
    position_bytes,
    to_cache_dtype,
)
from runner_calls import chunked, error, prompt, tables, together

LAYERS, EXPERTS, TOP_K = 2, 8, 3
RUNNERS = pytest.mark.parametrize("kind", [CpuRunner, TorchRunner])
pytestmark = pytest.mark.usefixtures("kernels")


def policies(config):
    banned = np.zeros((LAYERS, EXPERTS), dtype=bool)
    banned[:, :4] = True
    bias = np.random.default_rng(0).normal(size=(LAYERS, EXPERTS))
    return [
        RouterPolicy(bias=bias).resolve(config),
        None,
        RouterPolicy(banned=banned, top_k=1).resolve(config),
        RouterPolicy(top_k=8, renormalize=True).resolve(config),
    ]


def traced(runner, chosen, rows):
    ids = [prompt(6 + n, seed=n) for n in range(len(chosen))]
    cache = runner.new_cache(len(ids), 16)
    batch = Batch([i for p in ids for i in p], [len(p) for p in ids], [0] * len(ids), policies=chosen)
    return runner.forward(batch, CacheView(cache, tables(cache, len(ids))), Want(batch.ends(), rows))


def test_kernels_and_torch_choose_alike(isa):
    model = make_model()
    chosen, rows = policies(model.config), [0, 5, 7, 14, 20, 29]
    ours, theirs = (traced(kind(model), chosen, rows) for kind in (CpuRunner, TorchRunner))
    assert error(ours.logits, theirs.logits) < 1e-5
    assert ours.trace.expert_ids.shape == (len(rows), LAYERS, 8)
    assert torch.equal(ours.trace.expert_ids, theirs.trace.expert_ids)
    assert (ours.trace.weights - theirs.trace.weights).abs().max() < 1e-6


@RUNNERS
def test_what_a_policy_does(kind):
    model = make_model()
    trace = traced(kind(model), policies(model.config), range(6 + 7 + 8 + 9)).trace
    ids, weights = trace.expert_ids, trace.weights
    _, plain, banned, every = ids.split([6, 7, 8, 9])
    assert (plain[..., :TOP_K] >= 0).all()
    assert (plain[..., TOP_K:] == -1).all()
    assert (banned[..., 0] >= 4).all()
    assert (banned[..., 1:] == -1).all()
    assert (weights[13:21, :, 1:] == 0).all()
    assert torch.equal(every.sort(dim=-1).values, torch.arange(8, dtype=torch.int16).expand(9, LAYERS, 8))
    assert torch.allclose(weights[21:].sum(-1), torch.ones(9, LAYERS))
    assert (weights[6:13].sum(-1) < 1).all()


@RUNNERS
def test_the_models_own_policy_changes_nothing(kind):
    model = make_model()
    same = RouterPolicy().resolve(model.config)
    assert torch.equal(chunked(kind(model), prompt(9), [9], same), chunked(kind(model), prompt(9), [9]))


@RUNNERS
def test_a_policy_concerns_its_own_sequence(kind):
    runner = kind(make_model())
    one, other = prompt(9), prompt(12, seed=1)
    policy = policies(runner.config)[2]
    mixed = together(runner, [one, other], policies=[None, policy])
    alone = together(runner, [one]), together(runner, [other], policies=[policy])
    for both, left, right in zip(mixed, *alone, strict=True):
        assert error(both[0], left[0]) < 1e-6
        assert error(both[1], right[0]) < 1e-6
    assert not torch.equal(alone[1][0], together(runner, [other])[0])


@RUNNERS
def test_a_trace_is_what_the_network_routes(kind):
    from olmoe.model import causal_attend

    model = make_model()
    ids = prompt(11)
    cache = kind(model).new_cache(1, 11)
    out = kind(model).forward(Batch(ids, [11], [0]), CacheView(cache, tables(cache, 1)), Want([], [10, 3]))
    with torch.inference_mode():
        routers = model(torch.tensor([ids]), torch.arange(11).unsqueeze(0), causal_attend).routers
    for layer, routed in enumerate(routers):
        assert torch.equal(out.trace.expert_ids[:, layer].long(), routed.expert_ids[[10, 3]])
        assert (out.trace.weights[:, layer] - routed.weights[[10, 3]]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RouterPolicy(top_k=0), "from 1 to 8 experts per token, not 0"),
        (RouterPolicy(top_k=9), "from 1 to 8 experts per token, not 9"),
        (RouterPolicy(bias=np.zeros((3, EXPERTS))), r"shape \(2, 8\)"),
        (RouterPolicy(bias=np.full((LAYERS, EXPERTS), math.nan)), "consist of numbers"),
        (RouterPolicy(bias=np.full((LAYERS, EXPERTS), math.inf)), "consist of numbers"),
        (RouterPolicy(banned=np.zeros(8, dtype=bool)), r"shape \(2, 8\)"),
        (RouterPolicy(banned=np.arange(16).reshape(2, 8) >= 2), "leaves 0 experts"),
        (RouterPolicy(banned=np.arange(16).reshape(2, 8) % 8 >= 4, top_k=5), "leaves 4 experts .* chooses 5"),
    ],
)
def test_policies_that_fit_no_model_are_refused(policy, message):
    with pytest.raises(UserError, match=message):
        policy.resolve(make_model().config)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", None),
        (None, None),
        ("fp16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("f32", torch.float32),
        ("int8", torch.int8),
        (torch.int8, torch.int8),
    ],
)
def test_names_of_cache_dtypes(name, dtype):
    assert to_cache_dtype(name) == dtype


@pytest.mark.parametrize("name", ["int4", "fp8", "", torch.float64, torch.uint8])
def test_a_cache_of_another_dtype_is_refused(name):
    with pytest.raises(UserError, match=f"cannot be of {name}; choose auto, .* or int8"):
        to_cache_dtype(name)


@RUNNERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_token_takes_in_the_cache_what_the_runner_says(kind, dtype):
    runner = kind(make_model(num_key_value_heads=2))
    runner.cache_dtype = dtype
    cache = runner.new_cache(3, 128, block_size=64)
    assert cache.dtype == dtype
    assert runner.position_bytes == position_bytes(runner.config, dtype)
    assert cache.keys[0].untyped_storage().nbytes() == 3 * 128 * runner.position_bytes


@RUNNERS
def test_an_int8_cache_changes_little(kind):
    runner = kind(make_model())
    exact = together(runner, [prompt(90), prompt(30, seed=1)])
    runner.cache_dtype = torch.int8
    for ours, theirs in zip(together(runner, [prompt(90), prompt(30, seed=1)]), exact, strict=True):
        assert 1e-4 < error(ours, theirs) < 0.05


def test_kernels_and_torch_agree_on_an_int8_cache(isa):
    model = make_model(num_key_value_heads=2)
    runners = CpuRunner(model), TorchRunner(model, "reference")
    for runner in runners:
        runner.cache_dtype = torch.int8
    # Numbers that differ in their last bit may round to codes that differ by one.
    for ours, theirs in zip(*(together(runner, [prompt(90), prompt(30, seed=1)]) for runner in runners), strict=True):
        assert error(ours, theirs) < 2e-3
