"""LoRA on routed experts: PEFT's results, from the chosen experts alone."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM
from olmoe.hf import lora

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# A token uses 3 of 8 experts, so a single token leaves most of the stack unused.
CONFIG = small_config().to_dict()


def adapted(parameters=EXPERTS, adapters=1):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
    model = peft.get_peft_model(OlmoeForCausalLM(OlmoeConfig(**CONFIG)), config)
    for i in range(1, adapters):
        model.add_adapter(f"another{i}", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which PEFT initializes to zero
            torch.nn.init.normal_(parameter, std=0.2)
    if adapters > 1:
        model.base_model.set_adapter(["default", *(f"another{i}" for i in range(1, adapters))])
    return model.eval()


def ids(tokens=1):
    return torch.randint(2, VOCAB_SIZE - 1, (1, tokens), generator=torch.Generator().manual_seed(3))


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation computed, views aside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and function in (
            torch.ops.aten.baddbmm.default, torch.ops.aten.index.Tensor, torch.ops.aten.bmm.default,
            torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor,
        ):  # fmt: skip
            self.elements = max(self.elements, result.numel())
        return result


def largest(model):
    with torch.no_grad(), Largest() as seen:
        model(ids())
    return seen.elements


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_outputs_and_gradients_equal_pefts(parameters, adapters, monkeypatch):
    results = []
    for routed in (False, True):
        with monkeypatch.context() as patch:
            if not routed:
                patch.setattr("olmoe.hf.model.route_lora", lambda layers: None)
            model = adapted(parameters, adapters)
            output = model(ids(7), labels=ids(7))
            output.loss.backward()
            kinds = {type(layer.mlp.experts).__name__ for layer in model.base_model.model.model.layers}
            assert kinds == {"RoutedParamWrapper" if routed else "ParamWrapper"}
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((output.logits, gradients))
    (expected, theirs), (logits, ours) = results
    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    assert any("experts" in name for name in ours)
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6, rtol=1e-4), name


def test_decoding_computes_nothing_as_large_as_the_whole_stack(monkeypatch):
    model = adapted()
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    whole = experts.gate_up_proj.numel()
    with monkeypatch.context() as patch:
        patch.setattr("olmoe.hf.model.route_lora", lambda layers: None)
        assert largest(model) >= whole  # what PEFT does by itself
    assert 0 < largest(model) <= whole * CONFIG["num_experts_per_tok"] // CONFIG["num_experts"]


def test_disabling_merging_and_unmerging_equal_pefts():
    model = adapted()
    with torch.no_grad():
        expected = model(ids(5)).logits
        with model.disable_adapter():
            plain = model(ids(5)).logits
        assert not torch.allclose(plain, expected, atol=1e-3)
        model.merge_adapter()
        assert torch.allclose(model(ids(5)).logits, expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(model(ids(5)).logits, expected, atol=1e-5)
        merged = model.merge_and_unload()
        assert type(merged.model.layers[0].mlp.experts).__name__ == "OlmoeExperts"
        assert torch.allclose(merged(ids(5)).logits, expected, atol=1e-5)


def test_experts_without_adapters_are_untouched():
    model = OlmoeForCausalLM(OlmoeConfig(**CONFIG))
    before = model.model.layers[0].mlp.experts
    lora.route_lora(model.model.layers)
    assert model.model.layers[0].mlp.experts is before
    assert type(before).__name__ == "OlmoeExperts"


def test_another_experts_implementation_is_respected(monkeypatch):
    model, calls = adapted(), []
    with torch.no_grad():
        expected = model(ids(5)).logits
        functions = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
        batched = functions["batched_mm"]
        monkeypatch.setitem(
            type(functions)._global_mapping, "batched_mm", lambda *args: calls.append(1) or batched(*args)
        )
        model.base_model.model.set_experts_implementation("batched_mm")
        assert torch.allclose(model(ids(5)).logits, expected, atol=1e-5)
    assert len(calls) == 2  # one per layer


def test_per_example_gradients_and_second_derivatives_of_adapters():
    """Under `vmap` the chosen experts are unknown, and PEFT's own wrapper supports no torch.func transform."""
    model, batch = adapted(), torch.randint(2, VOCAB_SIZE - 1, (3, 6), generator=torch.Generator().manual_seed(3))
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach() for name, p in live.items()}

    def loss(parameters, rows):
        return torch.func.functional_call(model, parameters, (rows,), {"labels": rows}).loss

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, batch.unsqueeze(1))
    for row in range(3):
        alone = torch.autograd.grad(loss(live, batch[row : row + 1]), list(live.values()))
        for name, expected in zip(live, alone, strict=True):
            torch.testing.assert_close(each[name][row], expected, rtol=1e-4, atol=1e-6)

    first = torch.autograd.grad(loss(live, batch), list(live.values()), create_graph=True)
    directions = {name: torch.ones_like(p) for name, p in values.items()}
    second = torch.autograd.grad(sum(g.sum() for g in first), list(live.values()))
    forward = torch.func.jvp(torch.func.grad(lambda p: loss(p, batch)), (values,), (directions,))[1]
    for name, expected in zip(live, second, strict=True):
        torch.testing.assert_close(forward[name], expected, rtol=1e-3, atol=1e-5)


def test_activation_parameters_are_trained_with_adapters():
    model = adapted()
    for layer in model.base_model.model.model.layers:
        layer.mlp.experts.get_base_layer().act_fn = torch.nn.PReLU()
    model(ids(5), labels=ids(5)).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "act_fn" in name]
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_experts_held_elsewhere_contribute_nothing():
    """Under expert parallelism an id equal to the module's number of experts stands for those."""
    model, count = adapted(), CONFIG["num_experts"]
    with torch.no_grad():
        model(ids(5))
        experts = model.base_model.model.model.layers[0].mlp.experts
        x, chosen, weights = torch.randn(4, CONFIG["hidden_size"]), torch.tensor([[0, 3]] * 4), torch.ones(4, 2)
        expected = experts(x, chosen[:, :1], weights[:, :1])
        experts.get_base_layer()._is_expert_parallel = True
        result = experts(x, torch.where(chosen == 3, count, chosen), weights)
    assert torch.allclose(result, expected, atol=1e-5)
