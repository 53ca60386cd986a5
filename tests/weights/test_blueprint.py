"""Blueprints: what every edit keeps of layers and experts, and which edits no checkpoint can hold."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurations import small_config
from olmoe.weights.blueprint import Blueprint, LayerPlan, Mix
from sentences import refused

CONFIG = small_config()  # 2 layers of 8 experts, 3 a token
START = Blueprint.unchanged(CONFIG)
EVEN = [[0.1] * 8] * 2


def experts(blueprint, layer=0):
    return [mix.experts for mix in blueprint.layers[layer].experts]


def test_the_unchanged_model():
    assert START.config == CONFIG
    assert experts(START, 1) == [(e,) for e in range(8)]
    assert [layer.origin for layer in START.layers] == [0, 1]


def test_pruned_experts_are_counted_at_that_moment():
    once = START.without([[0, 5], [7, 6]])
    assert experts(once, 0) == [(1,), (2,), (3,), (4,), (6,), (7,)]
    assert experts(once, 1) == [(e,) for e in range(6)]
    assert experts(once.without([[0], [0]]), 0)[0] == (2,)
    assert once.config.num_experts == 6


def test_merged_experts_are_weighted_by_load():
    load = [[0.125, 0.0, 0.375, 0.0, 0.0, 0.0, 0.0, 0.5], [0.0] * 8]
    merged = START.merged([[[2, 0]], [[4, 5]]], load)
    assert merged.layers[0].experts[0] == Mix((0, 2), (0.25, 0.75))
    assert experts(merged, 0) == [(0, 2), (1,), (3,), (4,), (5,), (6,), (7,)]
    assert merged.layers[1].experts[4] == Mix((4, 5), (0.5, 0.5))  # nothing chose either
    again = merged.merged([[[0, 6]], [[0, 1]]], load)
    assert again.layers[0].experts[0].experts == (0, 2, 7)
    assert again.layers[0].experts[0].weights == (0.125, 0.375, 0.5)


def test_orders_and_layers():
    moved = START.reordered([[7, 6, 5, 4, 3, 2, 1, 0], list(range(8))])
    assert experts(moved, 0)[:2] == [(7,), (6,)]
    deeper = moved.with_copies([1]).with_layers([2, 0, 0])
    assert [layer.origin for layer in deeper.layers] == [1, 0, 0]
    assert experts(deeper, 2)[0] == (7,)
    assert deeper.config.num_hidden_layers == 3
    assert [layer.origin for layer in START.with_copies([0, 1]).layers] == [0, 0, 1, 1]


def test_routing():
    config = START.with_routing(top_k=1, normalize_top_k=True).config
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (1, True)
    assert START.with_routing().config == CONFIG


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (lambda: START.without([[0], [0, 1]]), "Layer 1 would have 6 experts and layer 0 7"),
        (lambda: START.without([range(8), range(8)]), "No expert would be left"),
        (lambda: START.without([[8], [0]]), "Layer 0 has no expert 8; its experts are 0 to 7"),
        (lambda: START.without([[0], [-1]]), "Layer 1 has no expert -1"),
        (lambda: START.without([[3, 3], [0, 1]]), "Expert 3 of layer 0 is named twice"),
        (lambda: START.without([range(6), range(6)]).config, "choose 3 experts, but a layer has 2"),
        (lambda: START.with_routing(top_k=9).config, "choose 9 experts, but a layer has 8"),
        (lambda: START.with_routing(top_k=0).config, "choose 0 experts"),
        (lambda: START.merged([[[0, 1], [1, 2]], []], EVEN), "Expert 1 of layer 0 is named twice"),
        (lambda: START.merged([[[0, 9]], [[0, 1]]], EVEN), "no expert 9"),
        (lambda: START.reordered([[0] * 8, [0] * 8]), "named twice"),
        (lambda: START.reordered([[0, 1], [0, 1]]), "names 2 experts, but the layer has 8"),
        (lambda: START.with_layers([]), "No layer would be left"),
        (lambda: START.with_layers([0, 2]), "no layer 2; the model's are 0 to 1"),
        (lambda: START.with_copies([-1]), "no layer -1"),
    ],
)
def test_what_no_checkpoint_can_be_is_refused(build, wanted):
    assert wanted in refused(build)


def test_json():
    edited = START.without([[0], [1]]).merged([[[0, 1]], [[2, 3]]], EVEN).with_copies([1]).with_routing(2, True)
    text = json.dumps(edited.to_dict() | {"model": "x"})
    assert Blueprint.from_dict(json.loads(text), CONFIG) == edited
    assert edited.to_dict()["layers"][0]["experts"][:2] == [[[1, 0.5], [2, 0.5]], 3]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "olmoe-edit-2"},
        {"layers": None},
        {"layers": []},
        {"layers": [{"from": 2, "experts": [0]}]},
        {"layers": [{"from": 0, "experts": [8]}]},
        {"layers": [{"from": 0, "experts": [[]]}]},
        {"layers": [{"from": 0, "experts": "ab"}]},
        {"layers": [{"experts": [0]}]},
        {"top_k": None},
    ],
    ids=str,
)
def test_other_json_is_refused(change):
    refused(lambda: Blueprint.from_dict(START.to_dict() | change, CONFIG))


@st.composite
def edits(draw):
    """A blueprint after some edits, and which of the original's experts were left out of each layer."""
    blueprint = START
    gone: list[set[int]] = [set(), set()]
    for kind in draw(st.lists(st.sampled_from(["without", "merged", "reordered"]), max_size=4)):
        count = blueprint.num_experts
        orders = [draw(st.permutations(range(count))) for _ in blueprint.layers]
        most = draw(st.integers(0, count - 1))
        if kind == "reordered":
            blueprint = blueprint.reordered(orders)
        elif kind == "without":
            for layer, order in enumerate(orders):
                gone[layer] |= {e for at in order[:most] for e in blueprint.layers[layer].experts[at].experts}
            blueprint = blueprint.without([order[:most] for order in orders])
        elif most > 1:
            load = draw(st.lists(st.floats(0, 1), min_size=8, max_size=8))
            blueprint = blueprint.merged([[order[:most]] for order in orders], [load, load])
    return blueprint, gone


@settings(max_examples=200, deadline=None)
@given(edits())
def test_every_expert_is_somewhere_or_was_left_out(case):
    blueprint, gone = case
    for layer, plan in enumerate(blueprint.layers):
        left = [e for mix in plan.experts for e in mix.experts]
        assert len(left) == len(set(left))
        assert set(left) == set(range(8)) - gone[layer]
        for mix in plan.experts:
            assert len(mix.experts) == len(mix.weights)
            assert sum(mix.weights) == pytest.approx(1)
    assert Blueprint.from_dict(json.loads(json.dumps(blueprint.to_dict())), CONFIG) == blueprint


def test_a_plan_is_as_it_is_given():
    with pytest.raises(ValueError, match="one number for all layers"):
        Blueprint(CONFIG, (LayerPlan(0, (Mix((0,)),)), LayerPlan(1, (Mix((0,)), Mix((1,))))), 1, False)
