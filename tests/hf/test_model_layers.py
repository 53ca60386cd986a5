"""Swapping, copying, pruning and repeating layers gives the results of transformers' own class."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from olmoe import OlmoeForCausalLM
from peers import IDS, assert_alike, decoded, difference, in_every_way, peers

ORDERS = {
    "swapped": [1, 0, 2], "pruned at the end": [0, 1], "pruned inside": [0, 2], "pruned at the start": [1, 2],
    "one left": [2], "up-scaled": [0, 1, 1, 2], "repeated": [0, 1, 0, 1, 2], "reversed": [2, 1, 0],
}  # fmt: skip


def arrange(model, order, copies, renumbered, counted=True):
    layers = [model.model.layers[i] for i in order]
    if copies:
        layers = [copy.deepcopy(layer) for layer in layers]
    if renumbered:
        for i, layer in enumerate(layers):
            layer.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(layers)
    if counted:
        model.config.num_hidden_layers = len(layers)
    return model


def results(model):
    """The results, or the type of the error."""
    found = [model(IDS, use_cache=False).logits.detach()]
    try:
        found.append(decoded(model))
    except Exception as error:
        found.append(type(error))
    return found


@pytest.mark.parametrize("renumbered", [True, False], ids=["renumbered", "as they were"])
@pytest.mark.parametrize("copies", [True, False], ids=["copies", "the same"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_rearranged_layers_equal_transformers(order, copies, renumbered):
    pair = [arrange(model, order, copies, renumbered) for model in peers(num_hidden_layers=3)]
    for a, b in zip(*map(results, pair), strict=True):
        if isinstance(b, type):
            assert a is b  # what both refuse: for example, two layers' keys in one slot do not fit a mask
        else:
            assert difference(a, b) < 2e-5
    if renumbered and len({id(layer) for layer in pair[0].model.layers}) == len(order):
        assert_alike(*pair)


def test_cache_slots_follow_layer_idx():
    model = arrange(peers(num_hidden_layers=3)[0], [2, 0, 1], copies=False, renumbered=True)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        rope = model.model.rotary_emb(IDS, torch.arange(IDS.shape[1]).unsqueeze(0))
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS))
        alone = transformers.DynamicCache(config=model.config)
        model.model.layers[0].self_attn(x, rope, None, alone)
    assert difference(cache.layers[0].keys, alone.layers[0].keys) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_configurations_number_of_layers_is_read_at_every_call(count):
    pair = peers(num_hidden_layers=3)
    for model in pair:
        model.config.num_hidden_layers = count
    asked = {"output_hidden_states": True, "output_router_logits": True}
    ours, theirs = (model(IDS, **asked) for model in pair)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == min(count, 3) + 1
    assert len(ours.router_logits) == len(theirs.router_logits) == min(count, 3)
    assert_alike(*pair)
    before = in_every_way(pair[0])
    pair[0].config.num_hidden_layers = 3
    if count < 3:
        assert difference(in_every_way(pair[0])[0], before[0]) > 1e-3


def test_fewer_layers_than_configured_work():
    pair = peers(num_hidden_layers=3)
    for model in pair:
        model.model.layers = model.model.layers[:2]
        assert type(model.model.layers) is nn.ModuleList
    assert_alike(*pair)
    chosen = [model(IDS, output_hidden_states=[0, -1, 1]).hidden_states for model in pair]
    for a, b in zip(*chosen, strict=True):
        assert (a is None) == (b is None)
        assert a is None or difference(a, b) < 1e-5


def test_early_exit_works_in_assisted_generation():
    ours, theirs = peers(num_hidden_layers=3)
    common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    drafts = []
    for model in (ours, theirs):
        counts = []
        model.model.layers[1].register_forward_pre_hook(lambda *_, counts=counts: counts.append(1))
        text = model.generate(IDS[:1], assistant_early_exit=1, **common)
        drafts.append((text, len(counts)))
        assert model.config.num_hidden_layers == 3
    assert torch.equal(drafts[0][0], drafts[1][0])
    assert drafts[0][1] == drafts[1][1]  # one layer drafts, as in theirs
    assert torch.equal(drafts[0][0], ours.generate(IDS[:1], **common))


def test_a_depth_up_scaled_model_survives_saving(tmp_path):
    model = arrange(peers(num_hidden_layers=2)[0], [0, 1, 1], copies=True, renumbered=True)
    model.save_pretrained(tmp_path)
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(in_every_way(loaded), in_every_way(model), strict=True):
        assert difference(a, b) < 1e-5
