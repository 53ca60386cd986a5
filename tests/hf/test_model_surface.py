"""The surface that hooks and analysis tools use equals transformers' own, module by module."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from transformers.models.olmoe import modeling_olmoe

from configurations import CASES, VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification
from olmoe.hf import attention
from olmoe.hf import model as hf_model
from peers import IDS, assert_alike, decoded, difference, peers

# The module classes of transformers' model, and where ours are.
KINDS = [name for name in vars(modeling_olmoe) if name.startswith("Olmoe") and not name.endswith(("Config", "MLP"))]
VALUES = (bool, int, float, str, type(None), torch.dtype)


def ours_named(name):
    return getattr(hf_model, name, None) or getattr(attention, name)


@pytest.fixture(scope="module")
def pair():
    return peers()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_and_modules_have_the_names_and_order_of_transformers(case):
    for classes in (("OlmoeForCausalLM", OlmoeForCausalLM), (None, OlmoeForSequenceClassification)):
        settings = small_config(**case.changes).to_dict() | {"num_labels": 3}
        if classes[0] is None:
            theirs = transformers.AutoModelForSequenceClassification
            if transformers.OlmoeConfig not in theirs._model_mapping:
                continue
            theirs = theirs.from_config(transformers.OlmoeConfig(**settings))
        else:
            theirs = getattr(transformers, classes[0])(transformers.OlmoeConfig(**settings))
        ours = classes[1](OlmoeConfig(**settings))
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
        assert [(n, type(m).__name__) for n, m in ours.named_modules() if "." in n and "proj" not in n] == [
            (n, type(m).__name__) for n, m in theirs.named_modules() if "." in n and "proj" not in n
        ]


def test_optimizer_state_transfers_both_ways_by_position():
    ours, theirs = peers(num_key_value_heads=2)
    optimizers = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizers.append(optimizer)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    # Another order would fail on mismatched shapes or update weights with other weights' moments.
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_every_attribute_of_transformers_exists_with_its_value(pair):
    ours, theirs = pair
    for (name, a), (same, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert name == same
        public = {key for key in dir(b) if not key.startswith("_")}
        assert {key for key in public if not hasattr(a, key)} == set(), name
        for key in public & vars(b).keys():
            if isinstance(getattr(b, key), VALUES):
                assert getattr(a, key) == getattr(b, key), f"{name}.{key}"


def test_walking_over_all_attributes_raises_nothing(pair):
    for model in (pair[0], OlmoeForSequenceClassification(pair[0].config)):
        for name, module in model.named_modules():
            for key in (*dir(module), "rope_init_fn", "no_such_attribute"):
                assert hasattr(module, key) or key not in vars(module), f"{name}.{key}"


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_accept_what_transformers_accept(kind):
    for method in ("__init__", "forward"):
        theirs = inspect.signature(inspect.unwrap(getattr(getattr(modeling_olmoe, kind), method))).parameters
        ours = inspect.signature(inspect.unwrap(getattr(ours_named(kind), method))).parameters
        keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())
        if kind != "OlmoePreTrainedModel":
            assert [name for name in theirs if name not in ours and not keywords] == [], (kind, method)


def test_modules_called_directly_return_the_same_as_transformers(pair):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(5).unsqueeze(0)
    for enabled in (True, False):
        found = []
        for model in pair:
            with torch.set_grad_enabled(enabled):
                layer = model.model.layers[1]
                rope = model.model.rotary_emb(x, positions)
                cache = transformers.DynamicCache(config=model.config)
                options = {"position_embeddings": rope, "attention_mask": None, "position_ids": positions}
                gate = layer.mlp.gate(x)
                found.append(
                    {
                        "rope": rope,
                        "norm": (layer.input_layernorm(hidden_states=x),),
                        "attention": layer.self_attn(hidden_states=x, **options),
                        "positional": layer.self_attn(x, rope, None, cache),
                        "gate": gate,
                        "experts": (
                            layer.mlp.experts(hidden_states=x[0], top_k_index=gate[2][:5], top_k_weights=gate[1][:5]),
                        ),
                        "mlp": (layer.mlp(hidden_states=x),),
                        "layer": (layer(x, **options, use_cache=False),),
                        "cached layer": (layer(x, **options, cache=cache, use_cache=True),),
                        "activation": (layer.mlp.experts.act_fn(x),),
                    }
                )
                assert isinstance(layer(x, **options), torch.Tensor)
                assert isinstance(layer.mlp(x), torch.Tensor)
        for name, theirs in found[1].items():
            ours = found[0][name]
            assert isinstance(ours, tuple)
            assert len(ours) == len(theirs), name
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None) == (b is None), name
                if b is not None:
                    assert difference(a.float(), b.float()) < 2e-5, name


@pytest.mark.parametrize(
    "where",
    [
        "model.layers.0", "model.layers.1.self_attn", "model.layers.0.mlp", "model.layers.1.mlp.gate",
        "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.act_fn", "model.layers.1.input_layernorm",
        "model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.v_proj", "model.rotary_emb", "model.norm",
        "model.embed_tokens", "lm_head",
    ],
)  # fmt: skip
def test_forward_hooks_see_and_change_the_same_as_transformers(where):
    def halved(output):
        if isinstance(output, tuple):  # a plain tuple, whatever the original was
            return tuple(t * 0.5 if t is not None and t.is_floating_point() else t for t in output)
        return output * 0.5

    seen = [], []
    pair = peers()
    undisturbed = decoded(pair[0])
    for model, outputs in zip(pair, seen, strict=True):
        module = model.get_submodule(where)
        module.register_forward_hook(lambda m, args, output, kept=outputs: kept.append(output) or halved(output))
    assert_alike(*pair)
    if not where.endswith("act_fn"):  # theirs is called once per expert
        assert len(seen[0]) == len(seen[1])
        for a, b in zip(*seen, strict=True):
            assert isinstance(a, tuple) == isinstance(b, tuple)
    assert difference(decoded(pair[0]), undisturbed) > 1e-4  # the hook makes a difference


def test_pre_hooks_see_and_change_the_same_as_transformers():
    pair, seen = peers(), ([], [])
    for model, kept in zip(pair, seen, strict=True):

        def hook(module, args, kwargs, kept=kept):
            kept.append((len(args), sorted(kwargs)))
            return tuple(2 * a for a in args), kwargs

        model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        model.model.layers[1].mlp.register_forward_pre_hook(hook, with_kwargs=True)
    outputs = [model(IDS, output_hidden_states=True, use_cache=False) for model in pair]
    for a, b in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        assert difference(a, b) < 1e-5  # the first is the input of the first layer
    assert [n for n, _ in seen[0]] == [n for n, _ in seen[1]]
    assert all(set(ours) <= set(theirs) for (_, ours), (_, theirs) in zip(*seen, strict=True))
    assert_alike(*pair)


def test_recorded_outputs_include_changes_by_hooks():
    pair = peers("eager")
    for model in pair:
        model.model.layers[0].register_forward_hook(lambda m, args, output: output + 1)
        model.model.layers[1].mlp.gate.register_forward_hook(lambda m, args, output: (output[0] * 2, *output[1:]))
    asked = {"output_hidden_states": True, "output_router_logits": True, "output_attentions": True}
    ours, theirs = (model(IDS, **asked) for model in pair)
    for name in ("hidden_states", "router_logits", "attentions"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert difference(a, b) < 1e-5, name
    assert not pair[0].model.layers[0].self_attn._forward_hooks  # nothing is left behind


def test_layers_may_be_replaced_by_other_classes():
    class Skip(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.up = torch.nn.Linear(32, 32)

        def forward(self, hidden_states):
            return self.up(hidden_states).relu()

    for change in ("layer", "mlp"):
        pair = peers(num_hidden_layers=3)
        for model in pair:
            if change == "layer":
                model.model.layers[1] = Skip()
            else:
                model.model.layers[1].mlp = Dense()
        assert_alike(*pair)


def test_the_model_can_be_traced():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    ours, theirs = peers()
    theirs.set_experts_implementation("batched_mm")  # "eager" would trace a loop over the chosen experts
    other = torch.randint(2, VOCAB_SIZE - 1, IDS.shape)
    with torch.no_grad():
        expected = decoded(ours)[:, : IDS.shape[1]], theirs(other).logits  # through the kernels, which cannot be traced
        for model in (ours, theirs):
            traced = torch.jit.trace(Logits(model), (IDS,))
            assert difference(traced(IDS), expected[0]) < 2e-5
            assert difference(traced(other), expected[1]) < 2e-5
    ours.config.use_cache, ours.config.return_dict = False, False
    assert difference(torch.jit.trace(ours, (IDS,), check_trace=False)(IDS)[0], expected[0]) < 2e-5
    frozen = ours.requires_grad_(False)  # as a function with the weights as constants
    traced = torch.jit.trace(lambda ids: frozen(input_ids=ids)[0], (IDS,))
    assert difference(traced(IDS), expected[0]) < 2e-5


def test_logits_to_keep_accepts_every_form(pair):
    marks = torch.zeros(IDS.shape, dtype=torch.bool)
    marks[0, 3] = marks[1, 4] = marks[1, 8] = True
    forms = [0, 1, 3, slice(2, 6), slice(-2, None), slice(None, None, 3), torch.tensor([0, 5]), [1, 2]]
    for form in (*forms, torch.tensor([[0, 5], [1, 2]]), marks):
        a, b = (model(IDS, logits_to_keep=form).logits for model in pair)
        assert difference(a, b) < 1e-5, form


def test_gradient_checkpointing_gives_hooks_the_same_values():
    pair = peers("eager")
    for model in pair:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.layers[0].register_forward_hook(lambda m, args, output: output * 0.5)
    losses = [model(IDS, labels=IDS, output_router_logits=True).loss for model in pair]
    assert difference(*losses) < 1e-5
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert difference(a.grad, b.grad) < 1e-4, name


def test_ids_outside_the_vocabulary_fail_as_in_transformers(pair):
    for model in pair:
        with pytest.raises(IndexError):
            model(torch.tensor([[VOCAB_SIZE]]))
