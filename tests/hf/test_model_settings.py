"""Settings changed after construction act as in transformers on every path: modules, kernels, steps."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

from peers import IDS, assert_alike, decoded, difference, peers


def every(name, value):
    """Set an attribute of one module in every layer."""

    def change(model):
        path, _, leaf = name.rpartition(".")
        for layer in model.model.layers:
            setattr(layer.get_submodule(path), leaf, value() if isinstance(value, type) else value)

    return change


def configured(name, value):
    return lambda model: setattr(model.config, name, value)


CHANGES = {
    "act_fn": every("mlp.experts.act_fn", nn.GELU),
    "act_fn, the same function": every("mlp.experts.act_fn", nn.SiLU),
    "act_fn by its name": every("mlp.experts.act_fn", ACT2FN["relu"]),
    "clip_qkv": configured("clip_qkv", 0.4),
    "clip_qkv of zero": configured("clip_qkv", 0.0),
    "top_k": every("mlp.gate.top_k", 1),
    "norm_topk_prob": every("mlp.gate.norm_topk_prob", True),
    "variance_epsilon": every("input_layernorm.variance_epsilon", 0.5),
    "variance_epsilon of q_norm": every("self_attn.q_norm.variance_epsilon", 0.5),
    "scaling": every("self_attn.scaling", 1.0),
    "final norm": lambda model: setattr(model.model.norm, "variance_epsilon", 0.5),
    "rope frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "rope scaling": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 2.0),
    "attention in one layer": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
    "gate of one layer": lambda model: setattr(model.model.layers[1].mlp.gate, "top_k", 8),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_settings_take_effect_on_every_path(change):
    pair = peers()
    before = decoded(pair[0])  # so that the kernels are prepared
    for model in pair:
        change(model)
    assert_alike(*pair)
    if change is not CHANGES["act_fn, the same function"]:
        assert difference(decoded(pair[0]), before) > 1e-4


def test_changed_settings_can_be_restored():
    ours, _ = peers()
    before = decoded(ours)
    original = [layer.mlp.experts.act_fn for layer in ours.model.layers]
    CHANGES["act_fn"](ours)
    ours.config.clip_qkv = 0.3
    decoded(ours)
    for layer, act_fn in zip(ours.model.layers, original, strict=True):
        layer.mlp.experts.act_fn = act_fn
    ours.config.clip_qkv = None
    assert torch.equal(decoded(ours), before)


def test_settings_read_at_construction_are_not_reread():
    pair = peers()
    for model in pair:
        for name, value in {"num_experts_per_tok": 1, "norm_topk_prob": True, "rms_norm_eps": 0.5}.items():
            setattr(model.config, name, value)
        model.config.hidden_act = "relu"
    assert_alike(*pair)


@pytest.mark.parametrize("value", [nn.functional.gelu, lambda x: x, 3], ids=["function", "lambda", "number"])
def test_an_activation_that_is_no_module_is_refused_as_by_transformers(value):
    for model in peers():
        with pytest.raises(TypeError, match="act_fn"):
            model.model.layers[0].mlp.experts.act_fn = value


def test_an_activation_with_parameters_is_trained():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.factor * torch.tanh(x)

    found = []
    for model in peers():
        every("mlp.experts.act_fn", Scaled)(model)
        model(IDS, labels=IDS).loss.backward()
        found.append([layer.mlp.experts.act_fn.factor.grad for layer in model.model.layers])
    for a, b in zip(*found, strict=True):
        assert difference(a, b) < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_set_on_the_module_takes_effect(attention):
    for model in peers(attention):
        model.train()
        plain = model(IDS, use_cache=False).logits
        every("self_attn.attention_dropout", 0.9)(model)
        assert difference(model(IDS, use_cache=False).logits, plain) > 1e-2
        assert difference(model.eval()(IDS, use_cache=False).logits, plain) < 1e-6


def test_losses_follow_changed_settings():
    pair = peers()
    for model in pair:
        model.router_aux_loss_coef = 0.5
        model.num_experts_per_tok = 1
    ours, theirs = (model(IDS, labels=IDS, output_router_logits=True) for model in pair)
    assert difference(ours.aux_loss, theirs.aux_loss) < 1e-5
    assert difference(ours.loss, theirs.loss) < 1e-5
    assert pair[0].config.router_aux_loss_coef == 0.01


def test_output_settings_in_the_config_take_effect():
    pair = peers("eager")
    for model in pair:
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            setattr(model.config, name, True)
        model.config.tie_last_hidden_states = False
    ours, theirs = (model(IDS) for model in pair)
    assert list(ours.keys()) == list(theirs.keys())
    for name in ("router_logits", "hidden_states", "attentions"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert difference(a, b) < 1e-5, name
    for model in pair:
        model.config.use_cache = False
    assert pair[0](IDS).past_key_values is None


@pytest.mark.parametrize("how", ["argument", "configuration", "module"])
def test_bidirectional_attention_can_be_set(how):
    pair = peers("sdpa")
    options = {"is_causal": False} if how == "argument" else {}
    for model in pair:
        if how == "configuration":
            model.config.is_causal = False
        elif how == "module":
            every("self_attn.is_causal", False)(model)
    with torch.no_grad():
        a, b = (model(IDS, **options).logits for model in pair)
        causal = peers("sdpa")[0](IDS).logits
    assert difference(a, b) < 1e-5
    assert difference(a, causal) > 1e-3


def test_attention_implementations_change_through_the_config():
    ours, theirs = peers("sdpa")
    for model in (ours, theirs):
        decoded(model)
        model.config._attn_implementation = "eager"
    assert len(ours(IDS, output_attentions=True).attentions) == 2
    assert_alike(ours, theirs)


def test_packed_experts_follow_changed_settings(tmp_path):
    ours, _ = peers()
    ours.save_pretrained(tmp_path)
    from olmoe import BitsAndBytesConfig, OlmoeForCausalLM

    packed = OlmoeForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    theirs = transformers.OlmoeForCausalLM.from_pretrained(tmp_path)
    experts = packed.model.layers[0].mlp.experts
    assert experts.has_gate
    assert experts.num_experts == 8
    decoded(packed)
    before = decoded(packed)
    every("mlp.experts.act_fn", nn.Tanh)(packed)
    packed.config.clip_qkv = 0.4
    after = decoded(packed)
    assert difference(after, before) > 0.1
    packed.dequantize()
    assert isinstance(packed.model.layers[0].mlp.experts.act_fn, nn.Tanh)
    theirs.load_state_dict(packed.state_dict())
    every("mlp.experts.act_fn", nn.Tanh)(theirs)
    theirs.config.clip_qkv = 0.4
    assert difference(after, decoded(theirs)) < 1e-3
