"""What a policy makes routers choose: against a loop that reads like its definition, on every backend."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import make_model
from olmoe import ops
from olmoe.errors import UserError
from olmoe.runner import Batch, CacheView, CpuRunner, RouterPolicy, TorchRunner, Want
from olmoe.runner.policy import own_policy, stack_policies
from olmoe.runner.torch_runner import route_policies
from runner_calls import chunked, error, prompt, tables, together

CONFIG = make_model().config
L, E, K = CONFIG.num_hidden_layers, CONFIG.num_experts, CONFIG.num_experts_per_tok
RUNNERS = pytest.mark.parametrize("kind", [CpuRunner, TorchRunner])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])


def mask(*places):
    found = np.zeros((L, E), dtype=bool)
    for layer, expert in places:
        found[layer, expert] = True
    return found


def some_policies():
    bias = np.random.default_rng(0).normal(size=(L, E))
    return [
        RouterPolicy(pinned=mask((0, 5), (1, 0), (1, 7))),
        RouterPolicy(temperature=0.25),
        RouterPolicy(bias=bias, banned=mask((0, 1)), pinned=mask((0, 2)), temperature=[3.0, 0.5], top_k=4),
        RouterPolicy(pinned=mask((0, 0), (1, 1)), renormalize=True, top_k=1),
        RouterPolicy(bias=bias),
    ]


def brute_force(logits, policy, layer):
    """(expert, weight) of each choice of one token, as the definition says."""
    biased = [float(z) + float(b) for z, b in zip(logits, policy.bias[layer], strict=True)]
    temperature = 1.0 if policy.temperature is None else float(policy.temperature[layer])
    plain, tempered = (
        [math.exp((z - max(biased)) / t) / sum(math.exp((y - max(biased)) / t) for y in biased) for z in biased]
        for t in (1.0, temperature)
    )
    falling = sorted(range(len(biased)), key=lambda e: (-plain[e], e))
    pinned = [] if policy.pinned is None else np.flatnonzero(policy.pinned[layer]).tolist()
    rest = [e for e in falling if e not in pinned]
    chosen = sorted([*pinned, *rest][: policy.top_k], key=falling.index)
    total = sum(tempered[e] for e in chosen) if policy.renormalize else 1.0
    return [(e, tempered[e] / total) for e in chosen]


@BACKENDS
@pytest.mark.parametrize("layer", range(L))
def test_routing_is_what_the_definition_says(backend, layer, kernels):
    logits = torch.randn(5 * 7, E, generator=torch.Generator().manual_seed(1)) * 2
    resolved = [policy.resolve(CONFIG) for policy in some_policies()]
    of_token = [n % len(resolved) for n in range(len(logits))]
    route = route_policies(resolved, torch.device("cpu"), of_token)[layer]
    weights, ids = ops.route(logits, K, False, route, backend=backend)
    assert ids.shape == weights.shape == (len(logits), 4)
    for n, row in enumerate(logits.tolist()):
        expected = brute_force(row, resolved[of_token[n]], layer)
        count = len(expected)
        assert ids[n].tolist() == [e for e, _ in expected] + [-1] * (4 - count)
        assert weights[n].tolist() == pytest.approx([w for _, w in expected] + [0.0] * (4 - count), rel=1e-5)


def traced(runner, policies):
    ids = [prompt(6 + n, seed=n) for n in range(len(policies))]
    cache = runner.new_cache(len(ids), 16)
    batch = Batch([i for p in ids for i in p], [len(p) for p in ids], [0] * len(ids), policies=policies)
    view = CacheView(cache, tables(cache, len(ids)))
    return batch, runner.forward(batch, view, Want(batch.ends(), range(len(batch.ids))))


def test_kernels_and_torch_choose_alike(isa):
    model = make_model()
    policies = [None, *(policy.resolve(CONFIG) for policy in some_policies())]
    (_, ours), (_, theirs) = (traced(kind(model), policies) for kind in (CpuRunner, TorchRunner))
    assert torch.equal(ours.trace.expert_ids, theirs.trace.expert_ids)
    # A temperature of 0.25 makes differences of logits four times as large.
    assert (ours.trace.weights - theirs.trace.weights).abs().max() < 4e-6
    assert error(ours.logits, theirs.logits) < 1e-5


@RUNNERS
def test_every_token_chooses_pinned_experts(kind, kernels):
    policies = [None, *(policy.resolve(CONFIG) for policy in some_policies())]
    batch, out = traced(kind(make_model()), policies)
    of_token = np.array(batch.sequence_of_token())
    ids = out.trace.expert_ids.numpy()
    for number, policy in enumerate(policies):
        own = ids[of_token == number]
        if policy is not None and policy.pinned is not None:
            for layer, expert in np.argwhere(policy.pinned):
                assert (own[:, layer] == expert).any(axis=1).all()
    without = ids[of_token == 0]
    assert not (without[:, 0] == 5).any(axis=1).all()  # what is pinned would not be chosen anyway


@RUNNERS
def test_a_pinned_expert_has_its_own_probability(kind, kernels):
    """That of the model's own routing, of all its experts."""
    runner, ids = kind(make_model()), prompt(9)
    every = RouterPolicy(top_k=E).resolve(CONFIG)
    pinned = RouterPolicy(pinned=mask((0, 5))).resolve(CONFIG)
    traces = []
    for policy in (every, pinned):
        cache = runner.new_cache(1, 16)
        batch = Batch(ids, [9], [0], policies=[policy])
        traces.append(runner.forward(batch, CacheView(cache, tables(cache, 1)), Want([], range(9))).trace)
    for n in range(9):
        (all_ids, all_weights), (ids_K, weights_K) = ((t.expert_ids[n, 0], t.weights[n, 0]) for t in traces)
        assert set(all_ids[: K - 1].tolist()) <= set(ids_K.tolist())
        for expert, weight in zip(ids_K.tolist(), weights_K.tolist(), strict=True):
            assert weight == pytest.approx(all_weights[all_ids == expert].item(), rel=1e-6)
        assert weights_K.tolist() == sorted(weights_K.tolist(), reverse=True)


@RUNNERS
def test_a_temperature_changes_weights_and_no_choice(kind, kernels):
    """Even one so low that only the first expert has a probability above zero."""
    runner, traces = kind(make_model()), []
    for temperature in (None, 1.0, 0.001, 0.5, 100.0):
        policy = RouterPolicy(temperature=temperature, top_k=E).resolve(CONFIG)
        _, out = traced(runner, [policy])
        traces.append(out.trace)
    plain, same, lowest, low, high = traces
    assert torch.equal(plain.weights, same.weights)
    for other in (lowest, low, high):
        # Of the first layer, whose input is the same.
        assert torch.equal(plain.expert_ids[:, 0], other.expert_ids[:, 0])
        assert torch.allclose(other.weights.sum(-1), torch.ones(6, L))
    assert (low.weights[:, 0, 0] > plain.weights[:, 0, 0]).all()
    assert (high.weights[:, 0] - 1 / E).abs().max() < 0.02
    assert (lowest.weights[:, 0, 0] > 0.9).all()


@BACKENDS
def test_a_sum_of_zero_is_not_divided_by(backend, kernels):
    """A low temperature may leave nothing for pinned experts."""
    policy = RouterPolicy(pinned=mask((0, 3)), top_k=1, renormalize=True, temperature=0.001).resolve(CONFIG)
    logits = torch.zeros(1, E)
    logits[0, 0] = 5.0
    route = route_policies([policy], torch.device("cpu"))[0]
    weights, ids = ops.route(logits, K, False, route, backend=backend)
    assert (weights.tolist(), ids.tolist()) == ([[0.0]], [[3]])


def test_gradients_reach_the_router(kernels):
    policy = RouterPolicy(pinned=mask((0, 3)), temperature=0.5, renormalize=True).resolve(CONFIG)
    route = route_policies([policy], torch.device("cpu"))[0]
    logits = torch.randn(4, E, dtype=torch.float32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights, ids = ops.route(logits, K, False, route)
    expected = ((logits / 0.5).softmax(-1)).gather(1, ids)
    expected = expected / expected.sum(-1, keepdim=True)
    shares = torch.arange(K, dtype=torch.float32)
    ours, theirs = (torch.autograd.grad((w * shares).sum(), logits, retain_graph=True)[0] for w in (weights, expected))
    assert ours.abs().max() > 1e-3
    assert torch.allclose(ours, theirs, atol=1e-6)


@RUNNERS
def test_sequences_without_a_policy_keep_their_bits(kind, kernels):
    """Beside others that pin, also where nothing but the machinery of pins is at work."""
    runner, ids = kind(make_model()), prompt(9)
    alone = chunked(runner, ids, [9])
    mixed = together(runner, [ids, ids], steps=0, policies=[own_policy(CONFIG), some_policies()[0].resolve(CONFIG)])
    if kind is CpuRunner:
        assert torch.equal(mixed[0][0], alone)
    assert error(mixed[0][0], alone) < 1e-6
    assert not torch.allclose(mixed[0][0], mixed[0][1])


def test_what_is_not_used_is_not_there():
    resolved = RouterPolicy(bias=np.ones((L, E)), pinned=np.zeros((L, E)), temperature=1).resolve(CONFIG)
    assert resolved.pinned is None
    assert resolved.temperature is None
    assert stack_policies([resolved])[3:] == (None, None)
    assert own_policy(CONFIG).changes(CONFIG) is False
    for policy in some_policies():
        assert policy.resolve(CONFIG).changes(CONFIG)


def test_policies_that_do_otherwise_are_told_apart():
    policies = [
        RouterPolicy(),
        RouterPolicy(top_k=1),
        RouterPolicy(renormalize=True),
        RouterPolicy(pinned=mask((0, 1))),
        RouterPolicy(banned=mask((0, 1))),
        RouterPolicy(pinned=mask((1, 0))),
        RouterPolicy(temperature=0.5),
        RouterPolicy(temperature=[0.5, 1.0]),
        RouterPolicy(temperature=[1.0, 0.5]),
    ]
    assert len({tuple(policy.resolve(CONFIG).identity()) for policy in policies}) == len(policies)
    assert RouterPolicy(temperature=[0.5, 0.5]).resolve(CONFIG).identity() == policies[6].resolve(CONFIG).identity()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RouterPolicy(pinned=np.zeros(E)), rf"pinned experts must have the shape \({L}, {E}\), not \({E},\)"),
        (RouterPolicy(pinned=mask((1, 2), (1, 3), (1, 4), (1, 5))), f"pins 4 experts in a layer, .* chooses {K}"),
        (RouterPolicy(pinned=mask((1, 2)), banned=mask((1, 2))), "both pins and bans the expert 2 of layer 1"),
        (RouterPolicy(temperature=0), "from 0.001 to 1000.0, not 0"),
        (RouterPolicy(temperature=[1.0, -2.0]), "from 0.001 to 1000.0, not -2"),
        (RouterPolicy(temperature=math.nan), "from 0.001 to 1000.0, not nan"),
        (RouterPolicy(temperature=[1.0] * 3), rf"one number or {L}, one per layer, not of shape \(3,\)"),
    ],
)
def test_policies_that_fit_no_model_are_refused(policy, message):
    with pytest.raises(UserError, match=message):
        policy.resolve(CONFIG)
