"""All kinds of derivatives through whole models, against transformers' own class where it supports them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from configurations import small_config
from olmoe import BitsAndBytesConfig, OlmoeConfig, OlmoeForCausalLM

SETTINGS = small_config(
    hidden_size=16, vocab_size=40, num_attention_heads=2, intermediate_size=8, num_experts=4, num_experts_per_tok=2,
    eos_token_id=39,
).to_dict()  # fmt: skip
IDS = torch.randint(2, 38, (3, 6), generator=torch.Generator().manual_seed(0))
GATE, NORM = "model.layers.0.mlp.gate.weight", "model.norm.weight"


class Calls:
    """Computations on one model; every method returns named tensors."""

    def __init__(self, model):
        self.model = model.eval()
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.directions = {
            name: torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            for name, p in self.parameters.items()
        }

    def loss(self, parameters, ids=IDS, **options):
        options = {"labels": ids, "output_router_logits": True} | options
        return functional_call(self.model, parameters, (ids,), options).loss

    def logits(self, parameters, ids=IDS, **options):
        return functional_call(self.model, parameters, (ids,), options).logits

    def along(self, gradients):
        return sum((gradients[name] * d).sum() for name, d in self.directions.items())

    def some_logits(self, parameters):
        return self.logits(parameters, use_cache=False)[0, :2, :5]

    def with_one(self, function, name):
        return lambda value: function({**self.parameters, name: value})

    def hessian_vector_product(self):
        named = dict(self.model.named_parameters())
        loss = self.model(IDS, labels=IDS, output_router_logits=True).loss
        first = dict(zip(named, torch.autograd.grad(loss, list(named.values()), create_graph=True), strict=True))
        return dict(zip(named, torch.autograd.grad(self.along(first), list(named.values())), strict=True))

    def hessian_vector_product_by_forward_mode(self):
        return jvp(grad(self.loss), (self.parameters,), (self.directions,))[1]

    def hessian_vector_product_by_transforms(self):
        return grad(lambda p: self.along(grad(self.loss)(p)))(self.parameters)

    def gradient(self):
        return grad(self.loss)(self.parameters)

    def vector_jacobian(self):
        return vjp(self.logits, self.parameters)[1](torch.ones(3, 6, 40))[0]

    def jacobian_vector(self):
        return {"": jvp(self.logits, (self.parameters,), (self.directions,))[1]}

    @torch.no_grad()
    def jacobian_vector_in_inference(self):
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(p, self.directions[name]) for name, p in self.parameters.items()}
            by_hand = forward_ad.unpack_dual(self.logits(dual)).tangent
        return self.jacobian_vector() | {"by hand": by_hand}

    def jacobians(self):
        backward = jacrev(self.some_logits)(self.parameters)
        forward = jacfwd(self.with_one(self.some_logits, NORM))(self.parameters[NORM])
        return backward | {"forward": forward}

    def whole_hessian(self):
        return {"": hessian(self.with_one(self.loss, GATE))(self.parameters[GATE])}

    def many_gradients(self):
        named = dict(self.model.named_parameters())
        incoming = torch.randn(4, 3, 6, 40, generator=torch.Generator().manual_seed(1))
        out = self.model(IDS).logits
        found = torch.autograd.grad(out, list(named.values()), incoming, is_grads_batched=True)
        return dict(zip(named, found, strict=True))

    def gradients_of_each_example(self):
        return vmap(grad(self.loss), in_dims=(None, 0))(self.parameters, IDS.unsqueeze(1))

    def each_example(self):
        return {"": vmap(lambda ids: self.model(ids).logits)(IDS.unsqueeze(1))}

    @torch.no_grad()
    def each_example_in_inference(self):
        one = vmap(lambda ids: self.model(ids).logits)(IDS[:, None, :1])
        return self.each_example() | {"one token": one}

    def ensemble(self):
        stacked = {name: torch.stack([p, p + 0.01 * self.directions[name]]) for name, p in self.parameters.items()}
        return {"": vmap(self.logits, in_dims=(0, None))(stacked, IDS)}


NAMES = [name for name, value in vars(Calls).items() if callable(value) and value.__code__.co_argcount == 1]


def close(ours, theirs, tolerance=1e-4):
    assert sorted(ours) == sorted(theirs)
    largest = max(float(t.abs().max()) for t in theirs.values())
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        assert float((ours[name] - expected).abs().max()) <= tolerance * largest, name


def ours(attention="eager", **changes):
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**SETTINGS | changes, attn_implementation=attention))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_transformers_own(name, attention):
    """Theirs with eager attention and experts in products that `vmap` can trace; ours in any setting."""
    model = ours(attention)
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SETTINGS, attn_implementation="eager"))
    theirs.set_experts_implementation("batched_mm")
    theirs.load_state_dict(model.state_dict())
    close(getattr(Calls(model), name)(), getattr(Calls(theirs), name)())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_second_derivatives_with_padding_and_grouped_heads(attention):
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[1, :3] = 0
    labels[1, :4] = -100  # nor what padding would predict, on which implementations differ
    found = {}
    for implementation in ("eager", attention):
        model = ours(implementation, num_key_value_heads=1)
        parameters = list(model.parameters())
        loss = model(IDS, attention_mask=mask, labels=labels).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        found[implementation] = {str(i): g for i, g in enumerate(second)}
    close(found[attention], found["eager"])


@pytest.mark.parametrize("loading", ["load_in_4bit", "load_in_8bit"])
def test_derivatives_through_quantized_models_equal_decoded_ones(loading, tmp_path):
    """With respect to the embeddings, as for adapters between packed matrices, against the decoded model."""
    ours(intermediate_size=32, hidden_size=32).save_pretrained(tmp_path)
    packed = OlmoeForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**{loading: True}), attn_implementation="eager"
    )
    inputs = packed.get_input_embeddings()(IDS).detach()
    direction = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))

    def derivatives(model):
        def loss(x):
            return model(inputs_embeds=x, labels=IDS).loss

        leaf = inputs.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with torch.no_grad():
            forward = jvp(loss, (inputs,), (direction,))[1]
        return {
            "second": torch.autograd.grad((first * direction).sum(), leaf)[0],
            "forward": forward,
            "twice": jvp(grad(loss), (inputs,), (direction,))[1],
            "each": vmap(grad(lambda x, ids: model(inputs_embeds=x, labels=ids).loss))(inputs[:, None], IDS[:, None]),
        }

    found = derivatives(packed)
    expected = derivatives(packed.dequantize())
    for name, value in expected.items():
        close({name: found[name]}, {name: value})


def test_vmap_works_over_per_layer_losses():
    calls = Calls(ours(router_loss="per_layer", router_z_loss_coef=0.1))
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0

    def loss(parameters, ids, mask):
        return calls.loss(parameters, ids, attention_mask=mask)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(calls.parameters, IDS[:, None], mask[:, None])
    rows = [grad(loss)(calls.parameters, IDS[i : i + 1], mask[i : i + 1]) for i in range(3)]
    close(found, {name: torch.stack([row[name] for row in rows]) for name in found})


@pytest.mark.parametrize("second", [False, True], ids=["first order", "second order"])
def test_a_forward_pass_frees_its_graph(second):
    """With a cache, whose keys hold the graph, so no part of the graph may hold the cache."""
    model = ours("sdpa").train()
    gc.collect()
    gc.disable()
    try:
        outputs = model(IDS, labels=IDS, use_cache=True)
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()), create_graph=second)
        if second:
            torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))
        hidden = weakref.ref(outputs.logits)
        keys = weakref.ref(outputs.past_key_values.layers[0].keys)
        del outputs, gradients
        assert hidden() is None
        assert keys() is None
    finally:
        gc.enable()
