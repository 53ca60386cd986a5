"""Adapters beside weights compute what merged ones do, forward and backward, over every kind of weight."""

from __future__ import annotations

import copy

import pytest
import torch

from adapter_cases import CASES, logits, random_adapter
from conftest import make_model
from olmoe import adapters
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.model import set_backend
from olmoe.weights import checkpoint, export
from olmoe.weights.checkpoint import open_source
from olmoe.weights.frozen import load_frozen
from packed_folders import WHOLE, decoded, packed_folder
from sentences import refused

FORMATS = ["plain", "int4", "nf4", "int8", "q4_0"]


def base(kind: str, folder):
    """A model with weights of that kind, and the same values unpacked."""
    if kind == "plain":
        model = make_model(**WHOLE).requires_grad_(False)
        return model, copy.deepcopy(model)
    if kind == "int4":
        model = checkpoint.load(packed_folder(folder / "packed", kind))
    else:
        export.save(make_model(**WHOLE), folder / "start")
        model = load_frozen(open_source(folder / "start"), kind)
    return model, decoded(model)


@pytest.mark.parametrize("targets", CASES)
@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapted_model_computes_as_a_merged_one(kind, targets, tmp_path):
    model, plain = base(kind, tmp_path)
    adapter = random_adapter(model.config, CASES[targets])
    before = logits(plain).detach()
    adapters.adapt(model, adapter)
    set_backend(model, "torch")  # which does not round activations, as the kernels do
    found = logits(model)
    # The same through weights that autograd knows.
    factors = {n: tuple(f.clone().requires_grad_(True) for f in pair) for n, pair in adapter.factors.items()}
    summed = {n: plain.get_parameter(n).detach() + (b @ a) * adapter.scale for n, (a, b) in factors.items()}
    expected = torch.func.functional_call(_Logits(plain), {f"model.{n}": w for n, w in summed.items()}, ())
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(found.shape, generator=generator)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    trained = adapters.factors_of(model)
    assert trained.keys() == factors.keys()
    for name, pair in trained.items():
        for one, other in zip(pair, factors[name], strict=True):
            assert other.grad.abs().max() > 0, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-2, atol=1e-2, msg=lambda m, n=name: f"{n}: {m}")
    grads = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(grads) == 2 * len(factors)


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return logits(self.model)


def test_a_new_adapter_changes_nothing():
    model = make_model()
    before = logits(model).detach()
    adapters.adapt(model, adapters.new_adapter(model.config, 2, 4.0, ("attention", "experts", "router"), seed=0))
    torch.testing.assert_close(logits(model).detach(), before)


def test_only_the_chosen_experts_are_computed(monkeypatch):
    model = make_model()
    adapters.adapt(model, random_adapter(model.config, ("experts",)))
    experts, seen = model.model.layers[0].mlp.experts, set()
    original = torch.nn.functional.linear

    def linear(x, weight, *rest):
        seen.update(e for e, a in enumerate(experts.gate_up_proj_a) if weight.data_ptr() == a.data_ptr())
        return original(x, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    experts(torch.ones(2, model.config.hidden_size), torch.tensor([[1, 4], [4, 6]]), torch.full((2, 2), 0.5))
    assert seen == {1, 4, 6}


def test_packed_weights_are_not_merged(tmp_path):
    model = checkpoint.load(packed_folder(tmp_path / "packed"))
    assert "pack the result" in refused(lambda: adapters.merge(model, random_adapter(model.config)), UserError)


def test_adapted_models_generate(tokenizer):
    """Beside packed weights there is no merging: the runner takes the modules."""
    model, merged = make_model(), make_model()
    adapter = random_adapter(model.config)
    adapters.adapt(model, adapter)
    adapters.merge(merged, adapter)
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    one, other = (
        LLM.from_parts(m, tokenizer).generate("the dog", params, show_progress=False)[0].text for m in (model, merged)
    )
    assert one == other


def test_an_adapter_of_the_head_is_not_left_out_beside_packed_weights():
    """It is added to plain weights; beside packed ones the layers' alone were computed."""
    model = make_model()
    adapter = random_adapter(model.config, ("attention",))
    v, d = model.lm_head.weight.shape
    adapter.factors["lm_head.weight"] = adapters.Factors(torch.ones(3, d), torch.ones(v, 3))
    assert "changes lm_head.weight" in refused(lambda: adapters.adapt(model, adapter), UserError)
    before = model.lm_head.weight.detach().clone()
    adapters.apply(model, adapter)
    torch.testing.assert_close(model.lm_head.weight, before + 3 * adapter.scale)
