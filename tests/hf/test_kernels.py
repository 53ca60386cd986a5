"""The C++ kernels in the transformers classes: on by default in inference, off wherever they would change behaviour."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification, OlmoeModel
from olmoe.errors import BackendUnavailableError
from olmoe.hf import attention
from olmoe.hf.model import OlmoeDecoderLayer
from olmoe.ops.cpu import extension
from olmoe.quant import PackedExperts, PackedModule
from packed_folders import WHOLE, packed_folder
from sentences import refused

# Few rows, so that plain weights use the kernels too.
IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 4), generator=torch.Generator().manual_seed(1))
compiled = pytest.mark.skipif(not extension.available(), reason="the C++ kernels are not built")


def ours(dtype=torch.float32, kind=OlmoeForCausalLM, **changes):
    """Our model, with the same weights every time."""
    torch.manual_seed(0)
    attention = changes.pop("attention", "sdpa")
    return kind(OlmoeConfig(**small_config(**changes).to_dict(), attn_implementation=attention)).to(dtype).eval()


@pytest.fixture
def calls(monkeypatch):
    """Whether the kernels ran the layer: one entry per call of a decoder layer, alone or in a step through all."""
    taken: list[bool] = []
    original, together = OlmoeDecoderLayer._fitting, attention.all_layers

    def record(layer, *arguments):
        kernel = original(layer, *arguments)
        taken.append(kernel is not None)
        return kernel

    def record_all(layers, *arguments):
        out = together(layers, *arguments)
        if out is not None:
            taken.extend([True] * len(layers))
        return out

    monkeypatch.setattr(OlmoeDecoderLayer, "_fitting", record)
    monkeypatch.setattr(attention, "all_layers", record_all)
    return taken


def on_torch(model, *arguments, **options):
    """The model's logits without kernels."""
    model.set_kernel_backend("torch")
    try:
        return model(*arguments, **options)
    finally:
        model.set_kernel_backend("auto")


@compiled
@pytest.mark.parametrize("kind", [OlmoeModel, OlmoeForCausalLM, OlmoeForSequenceClassification])
def test_inference_uses_the_kernels_by_default(calls, kind):
    model = ours(kind=kind, pad_token_id=1)
    with torch.no_grad():
        actual = model(IDS)
        assert calls == [True, True]
        torch.testing.assert_close(actual[0], on_torch(model, IDS)[0], rtol=1e-4, atol=1e-5)
    assert calls == [True, True, False, False]


@compiled
def test_generation_decodes_with_the_kernels(calls):
    model = ours()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    actual = model.generate(IDS, **options)
    assert all(calls)
    assert len(calls) == 2 * 6
    model.set_kernel_backend("torch")
    assert torch.equal(actual, model.generate(IDS, **options))
    assert not any(calls[12:])


@compiled
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_recorded_outputs_equal_torchs(calls, attention):
    model = ours(attention=attention, num_key_value_heads=2)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask, "output_hidden_states": True, "output_router_logits": True}
    if attention == "eager":
        options["output_attentions"] = True
    with torch.no_grad():
        actual, expected = model(IDS, **options), on_torch(model, IDS, **options)
    assert calls == [True, True, False, False]
    kept = mask.bool()
    for name in ("hidden_states", "router_logits", "attentions"):
        if name == "attentions" and attention != "eager":
            continue
        for a, b in zip(actual[name], expected[name], strict=True):
            assert a.dtype == b.dtype
            if name == "hidden_states":
                a, b = a[kept], b[kept]
            elif name == "router_logits":
                a, b = a[kept.flatten()], b[kept.flatten()]
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@compiled
def test_the_kernels_are_not_used_with_gradients(calls):
    model = ours()
    model(IDS, labels=IDS).loss.backward()
    assert calls == [False, False]
    assert all(p.grad is not None for p in model.parameters())


@compiled
def test_the_kernels_are_not_used_in_trained_layers_after_frozen_ones(calls):
    model = ours()
    model.model.embed_tokens.requires_grad_(False)  # so that the input of the first layer needs no gradient
    model(IDS, labels=IDS).loss.backward()
    assert calls == [False, False]
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp.gate.weight", "input_layernorm.weight", "self_attn.k_norm.weight"])
def test_weights_changed_in_place_between_calls_take_effect(calls, dtype, name):
    model = ours(dtype)
    with torch.no_grad():
        model(IDS)
        model.model.layers[1].get_parameter(name).mul_(-0.5)  # as an optimizer or load_state_dict would
        actual = model(IDS).logits
        assert all(calls)
        expected = on_torch(model, IDS).logits
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


@compiled
def test_moved_and_replaced_weights_take_effect(calls):
    model = ours()
    with torch.no_grad():
        model(IDS)
        other = ours(initializer_range=0.3)
        model.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=0, atol=0)
        model.double()  # a dtype that the kernels lack
        assert torch.isfinite(model(IDS).logits).all()
    assert calls == [True] * 6 + [False, False]


@compiled
def test_copies_and_pickles_have_their_own_kernels(calls):
    model = ours(torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not any("_view" in vars(layer) for layer in twin.model.layers)
            assert torch.equal(twin(IDS).logits, expected)
            twin.model.layers[0].post_attention_layernorm.weight.mul_(3.0)
            assert not torch.equal(twin(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
    assert all(calls)


@compiled
def test_the_kernels_leave_no_trace_in_the_state(calls, tmp_path):
    model = ours()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(IDS)
    assert list(model.state_dict()) == list(before)
    model.save_pretrained(tmp_path)
    again = OlmoeForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    assert "kernel" not in (tmp_path / "config.json").read_text()


@compiled
def test_a_hook_inside_a_layer_is_called(calls):
    model = ours()
    seen = []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(IDS)
        assert calls == [False, True]
        assert seen == [1]
        handle.remove()
        model(IDS)
    assert calls == [False, True, True, True]


@compiled
def test_the_kernels_are_not_used_with_another_experts_implementation(calls):
    model = ours()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        switched = model(IDS).logits
        assert calls == [False, False]
        model.set_experts_implementation("olmoe")
        torch.testing.assert_close(model(IDS).logits, switched, rtol=1e-4, atol=1e-5)
    assert calls == [False, False, True, True]


@compiled
def test_the_kernels_are_not_used_in_layers_with_adapters(calls):
    peft = pytest.importorskip("peft")
    base = ours()
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        adapted = model(IDS).logits
        assert calls == [True, False]
        with model.disable_adapter():
            assert not torch.allclose(model(IDS).logits, adapted)
        merged = model.merge_and_unload()
        calls.clear()
        torch.testing.assert_close(merged(IDS).logits, adapted, rtol=1e-4, atol=1e-5)
    assert calls == [True, True]


@compiled
def test_compiling_traces_the_model_without_kernels():
    model = ours(num_hidden_layers=1)
    with torch.no_grad():
        eager = model(IDS).logits  # prepared before compiling, which the graph must not see
        graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(graph(IDS).logits, eager, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_packed_folders_generate_with_the_kernels(calls, tmp_path, recipe):
    model = OlmoeForCausalLM.from_pretrained(packed_folder(tmp_path / "packed", recipe, **WHOLE))
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    many = IDS.repeat(8, 4)  # the kernels multiply packed matrices for any number of tokens
    with torch.no_grad():
        actual = model(many).logits
        assert calls == [True, True]
        expected = on_torch(model, many).logits
    # The kernels round activations to 8 bits, torch to bf16; now and then that changes a router's choice.
    errors = (actual - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert errors.median() < 0.03
    assert (errors < 0.05).float().mean() > 0.8
    del calls[:]
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert calls == [True] * 8


@compiled
def test_dequantized_models_keep_the_choice_of_backend(calls, tmp_path):
    model = OlmoeForCausalLM.from_pretrained(packed_folder(tmp_path / "packed", "int8", **WHOLE))
    model.set_kernel_backend("torch")
    plain = model.dequantize()
    assert not any(isinstance(module, PackedModule) for module in plain.modules())
    assert {module.backend for module in plain.modules() if hasattr(module, "backend")} == {"torch"}
    with torch.no_grad():
        plain(IDS)
    assert calls == [False, False]


def test_the_reference_can_be_chosen():
    model = ours()
    with torch.no_grad():
        expected = on_torch(model, IDS).logits
        model.set_kernel_backend("reference")
        assert model.kernel_backend == "reference"
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_refused_and_changes_nothing():
    model = ours()
    assert "'cuda'" in refused(lambda: model.set_kernel_backend("cuda"))
    assert model.kernel_backend == "auto"


def test_kernels_that_are_not_installed_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: (None, "the C++ kernels are not installed"))
    model = ours()
    assert "not installed" in refused(lambda: model.set_kernel_backend("cpu"), BackendUnavailableError)
    assert model.kernel_backend == "auto"
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()  # the automatic choice works without them


@compiled
def test_kernels_are_refused_for_a_model_on_another_device():
    with torch.device("meta"):
        model = ours()
    assert "meta" in refused(lambda: model.set_kernel_backend("cpu"), BackendUnavailableError)


@compiled
def test_training_with_kernels_requested_by_name_is_refused():
    model = ours()
    model.set_kernel_backend("cpu")
    with torch.no_grad():
        model(IDS)
    with pytest.raises(BackendUnavailableError, match="gradients"):
        model(IDS)
