"""LoRA on the experts and linear layers of quantized models: the results of the same adapter on decoded weights."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch

from configurations import VOCAB_SIZE
from olmoe import AutoModelForCausalLM, OlmoeForCausalLM, OlmoeForSequenceClassification
from olmoe.errors import UserError
from olmoe.hf import adapted
from olmoe.hf.experts import OlmoeExperts
from olmoe.model import set_backend
from olmoe.ops.cpu import extension
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from quantized_models import BLOCKS, FORMATS, IDS, QuantizedModels, logits, stir, trained

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "gate_up": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down and attention": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    "all-linear": {"target_modules": "all-linear"},
    "projections": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "one projection": {"target_modules": ["down_proj", "v_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
    "a linear layer by its parameter": {"target_modules": [], "target_parameters": ["self_attn.k_proj.weight"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "embeddings by their parameters": {
        "target_modules": [],
        "target_parameters": ["embed_tokens.weight", "lm_head.weight"],
    },
}
BOTH = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
every_format = pytest.mark.parametrize("format", FORMATS)
some_formats = pytest.mark.parametrize("format", ["nf4", "int8", "q4_0"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return QuantizedModels(tmp_path_factory.mktemp("models"))


def lora(model, **options):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**({"r": 2} | options)))


def close(given, expected, atol=1e-5):
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert (given[name] - value).abs().max() < atol, name


def kinds(model):
    return {type(module) for module in model.modules() if isinstance(module, PackedModule)}


@every_format
@pytest.mark.parametrize("targets", TARGETS)
def test_logits_and_gradients_equal_those_on_decoded_weights(models, format, targets):
    base = logits(models.load(format))
    results = []
    for dequantize in (False, True):
        model = stir(lora(models.load(format, dequantize), **TARGETS[targets]))
        results.append(trained(model))
        assert (logits(model) - base).abs().max() > 0.1
        with model.disable_adapter():
            assert (logits(model) - base).abs().max() < 1e-5
    close(*results)
    assert all(gradient.abs().max() > 0 for name, gradient in results[0].items() if name != "logits")


@some_formats
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "r": 4},
        {"rank_pattern": {"mlp.experts.gate_up_proj": 4, "q_proj": 1}, "alpha_pattern": {"q_proj": 2}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"bias": "all", "modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": [3, 5, 7]},
    ],
    ids=str,
)
def test_lora_options_give_the_results_on_decoded_weights(models, format, options):
    results = [trained(stir(lora(models.load(format, d), **(BOTH | options)))) for d in (False, True)]
    close(*results)


@every_format
def test_train_save_load_and_merge(models, format, tmp_path):
    model = lora(models.load(format), task_type="CAUSAL_LM", modules_to_save=["lm_head"], **BOTH).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert not any(torch.equal(parameters[name], value) for name, value in before.items())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(models.load(format), tmp_path)), expected)
    direct = models.load(format)
    direct.load_adapter(tmp_path)  # transformers' way
    assert torch.equal(logits(direct), expected)
    on_decoded = peft.PeftModel.from_pretrained(models.load(format, dequantize=True), tmp_path)
    assert (logits(on_decoded) - expected).abs().max() < 1e-5
    with pytest.raises(UserError, match=r"packed as \w+ and cannot be changed.*; call dequantize\(\)") as refusal:
        model.merge_and_unload()
    assert "\n" not in str(refusal.value)
    assert torch.equal(logits(model), expected)  # nothing was merged
    model.dequantize()
    assert (logits(model) - expected).abs().max() < 1e-5
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for whole in (merged, OlmoeForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)):
        assert (logits(whole) - expected).abs().max() < 1e-4


@some_formats
def test_an_adapter_trained_on_the_plain_model_loads(models, format, tmp_path):
    plain = stir(lora(models.load(format, dequantize=True), task_type="CAUSAL_LM", **BOTH))
    plain.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(models.load(format), tmp_path)
    assert (logits(model) - logits(plain)).abs().max() < 1e-5


@some_formats
def test_merging_and_unmerging_in_place_is_refused(models, format):
    model = stir(lora(models.load(format), **BOTH))
    expected = logits(model)
    with pytest.raises(UserError, match=r"call dequantize\(\)"):
        model.merge_adapter()
    with pytest.raises(UserError, match=r"call dequantize\(\)"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), expected)


@some_formats
def test_several_adapters_added_after_a_forward_pass(models, format):
    """The second one meets wrappers whose class we have changed."""
    results = []
    for dequantize in (False, True):
        model = lora(models.load(format, dequantize), **BOTH)
        logits(model)
        second = peft.LoraConfig(r=3, target_modules=["v_proj"], target_parameters=EXPERTS)
        model.add_adapter("second", second)
        generator, seen = torch.Generator().manual_seed(5), []
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        for active in ("default", "second", ["default", "second"]):
            model.base_model.set_adapter(active)
            seen.append(logits(model))
        model.delete_adapter("second")
        seen += [logits(model), logits(model.unload())]
        results.append(dict(enumerate(seen)))
    close(*results)
    assert (results[0][2] - results[0][0]).abs().max() > 0.1


@some_formats
def test_unloading_gives_the_packed_model_back(models, format, tmp_path):
    untouched = models.load(format)
    model = lora(models.load(format), **(BOTH | {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}))
    assert adapted.AdaptedExperts in kinds(model)
    model = model.unload()
    assert kinds(model) == kinds(untouched)
    assert model.state_dict().keys() == untouched.state_dict().keys()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(OlmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), logits(untouched))


@some_formats
def test_modules_without_adapters_are_unchanged(models, format):
    """The kernels still run those layers, and state dicts keep holding codes."""
    plain = models.load(format).state_dict()
    model = lora(models.load(format), target_modules=["q_proj"], layers_to_transform=[0])
    layers = model.base_model.model.model.layers
    assert type(layers[0].self_attn.q_proj.base_layer) is adapted.AdaptedLinear
    assert type(layers[1].self_attn.q_proj) is type(layers[0].self_attn.k_proj) is PackedLinear
    assert type(layers[0].mlp.experts) is PackedExperts
    stored = {name.replace(".base_layer", ""): value for name, value in model.base_model.model.state_dict().items()}
    for name, value in plain.items():
        assert torch.equal(stored[name], value), name


@some_formats
def test_a_refused_method_leaves_the_model_unchanged(models, format):
    model = models.load(format)
    before, expected = kinds(model), logits(model)
    with pytest.raises(UserError, match=r"weight is packed as \w+ and cannot be changed.*; call dequantize\(\)"):
        lora(model, target_modules=["q_proj"], init_lora_weights="pissa")
    assert torch.equal(logits(model), expected)
    assert kinds(model) == before
    results = [trained(stir(lora(m, **BOTH))) for m in (model, models.load(format, dequantize=True))]
    close(*results)


@every_format
def test_generation_with_adapters_equals_decoded_weights(models, format):
    model = stir(lora(models.load(format), task_type="CAUSAL_LM", **BOTH))
    settings = {"input_ids": IDS, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(**settings)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**settings), tokens)
    model.dequantize()
    set_backend(model, "torch")
    assert torch.equal(model.merge_and_unload().generate(**settings), tokens)


@pytest.mark.parametrize("format", BLOCKS)
def test_the_kernels_decode_with_adapters(models, format, monkeypatch):
    """As accurate as without adapters, where activations are quantized too."""
    if extension.unavailable() is not None:
        pytest.skip("no kernels")
    model = stir(lora(models.load(format), **BOTH))
    experts = model.base_model.model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(5, 32, generator=generator), torch.rand(5, 3, generator=generator)
    ids = torch.tensor([[0, 3, 7], [1, 3, 2], [4, 5, 6], [0, 1, 2], [7, 6, 5]])
    with torch.no_grad():
        expected = experts(x, ids, weights)
        set_backend(model, "auto")
        monkeypatch.setattr(PackedExperts, "product", lambda *args: pytest.fail("computed in torch"))
        result = experts(x, ids, weights)
    assert 0 < (result - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("reentrant", [True, False])
@some_formats
def test_half_precision_with_prepare_for_kbit_training_and_checkpointing(models, format, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = peft.prepare_model_for_kbit_training(
            models.load(format, dtype=torch.bfloat16),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        model = stir(lora(model, modules_to_save=["lm_head"], **BOTH)).train()
        gradients.append(trained(model))
        assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    close(*gradients, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("format", ["nf4", "q8_0"])
@pytest.mark.parametrize("prepared", [False, True])
def test_weights_are_read_in_the_dtype_of_the_model(models, format, prepared):
    """DoRA and other methods multiply with the weights."""
    for method in (peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), peft.HRAConfig(r=2)):
        method.target_modules = {"q_proj", "v_proj"}
        model = models.load(format, dtype=torch.bfloat16)
        if prepared:
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        result = logits(peft.get_peft_model(model, method))  # untrained, they change nothing
        exact = logits(models.load(format))
        assert (result - exact).norm() < 0.1 * exact.norm()


@some_formats
def test_copies_and_pickles(models, format):
    model = stir(lora(models.load(format), modules_to_save=["lm_head"], **BOTH))
    expected, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert kinds(other) == kinds(model)
        assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("format", ["int8", "q4_0"])
def test_a_compiled_model_applies_its_adapters(models, format):
    model = stir(lora(models.load(format), **BOTH)).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        result = compiled(input_ids=IDS).logits  # before any ordinary call
    assert (result - logits(model)).abs().max() < 1e-5


def test_classifiers_train_their_head_and_expert_adapters(models):
    model = models.load("q4_0", cls=OlmoeForSequenceClassification)
    model.config.pad_token_id = 1
    model = lora(model, task_type="SEQ_CLS", **BOTH)
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in gradients)
    assert all(gradient is not None for gradient in gradients.values())


@pytest.mark.parametrize("format", ["nf4", "q4_0"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "k_proj", "experts"])
def test_modules_to_save_are_trained_as_ordinary_ones(models, format, name, tmp_path):
    results = []
    for dequantize in (False, True):
        model = stir(lora(models.load(format, dequantize), target_modules=["q_proj"], modules_to_save=[name]), std=0.05)
        results.append(trained(model))
        if not dequantize:
            expected = logits(model)
            model.save_pretrained(tmp_path)
    close(*results)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(models.load(format), tmp_path)), expected)


def test_offloaded_codes_support_lora_but_no_method_that_reads_them(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes re-offloaded weights under the current folder
    folder, _ = models.source("q4_0")
    whole = stir(lora(models.load("q4_0"), target_modules=["q_proj"]))
    whole.save_pretrained(tmp_path / "adapter")
    places = {"model.layers.1": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    options = {"dtype": torch.float32, "device_map": places, "offload_folder": tmp_path}
    model = peft.PeftModel.from_pretrained(
        OlmoeForCausalLM.from_pretrained(folder, **options),
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": place for name, place in places.items()},
        offload_folder=tmp_path,
    )
    assert torch.equal(logits(model), logits(whole))
    for config in (peft.LoraConfig(r=2, **BOTH), peft.HRAConfig(r=2, target_modules=["q_proj"])):
        with pytest.raises(UserError, match="partly offloaded.*; load it without a device_map that offloads"):
            peft.get_peft_model(OlmoeForCausalLM.from_pretrained(folder, **options), config)


def test_saving_a_fully_trained_module_among_packed_ones_is_refused(models, tmp_path):
    model = lora(models.load("q4_0"), target_modules=["q_proj"], modules_to_save=["k_proj"]).unload()
    with pytest.raises(UserError, match=r"k_proj was trained as a whole.*; call dequantize\(\)"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path)
    assert (logits(OlmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("format", ["nf4", "q8_0"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=str)
def test_tied_embeddings(tmp_path, format, saved):
    models = QuantizedModels(tmp_path, tie_word_embeddings=True)
    packed, plain = (stir(lora(models.load(format, d), modules_to_save=saved, **BOTH)) for d in (False, True))
    expected = logits(plain)
    assert (logits(packed) - expected).abs().max() < 1e-5
    packed.dequantize()
    assert (logits(packed.merge_and_unload()) - expected).abs().max() < 1e-4


@some_formats
def test_autocast_and_inference_mode(models, format):
    for config in (peft.LoraConfig(r=2, **BOTH), peft.HRAConfig(r=2, target_modules=["q_proj"])):
        torch.manual_seed(0)
        model = stir(peft.get_peft_model(models.load(format), config))
        expected = logits(model)
        with torch.inference_mode():
            assert torch.equal(model(input_ids=IDS).logits, expected)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert (output.logits - expected).norm() < 0.2 * expected.norm()
        distances = (output.logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert distances.median() < 0.03  # for a whole token; single values can differ where routing does


def test_reading_a_packed_heads_weight_decodes_it(models):
    """Trainers that fuse the loss with the head multiply with its weight themselves."""
    model = models.load("q8_0")
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        assert torch.allclose(hidden @ model.lm_head.weight.T, model(IDS).logits, atol=1e-5)
    assert model.state_dict()["lm_head.weight"].dtype == torch.uint8
    assert isinstance(model.model.embed_tokens, PackedEmbedding)


def test_auto_classes_load_an_adapter_onto_its_quantized_base(models, tmp_path):
    folder, _ = models.source("q4_0")
    model = stir(lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), task_type="CAUSAL_LM", **BOTH))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@some_formats
def test_per_example_gradients_and_second_derivatives(models, format):
    """Under `vmap` the chosen experts are unknown."""
    model = stir(lora(models.load(format), **BOTH))
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = {name: p.detach() for name, p in live.items()}

    def loss(parameters, rows):
        return torch.func.functional_call(model, parameters, (rows,), {"labels": rows}).loss

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, IDS.unsqueeze(1))
    for row in range(len(IDS)):
        alone = torch.autograd.grad(loss(live, IDS[row : row + 1]), list(live.values()))
        for name, expected in zip(live, alone, strict=True):
            torch.testing.assert_close(each[name][row], expected, rtol=1e-4, atol=1e-6)

    first = torch.autograd.grad(loss(live, IDS), list(live.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), list(live.values()))
    directions = {name: torch.ones_like(p) for name, p in values.items()}
    forward = torch.func.jvp(torch.func.grad(lambda p: loss(p, IDS)), (values,), (directions,))[1]
    for name, expected in zip(live, second, strict=True):
        torch.testing.assert_close(forward[name], expected, rtol=1e-3, atol=1e-5)


def test_per_example_gradients_in_half_precision(models):
    """The LoRA factors are fp32, the decoded weights are not."""
    model = stir(lora(models.load("nf4", dtype=torch.bfloat16), target_modules=[], target_parameters=EXPERTS))
    experts = model.base_model.model.model.layers[0].mlp.experts
    x, ids = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([[0, 3, 7]] * 4)
    ids, weights = torch.stack([ids, 7 - ids]), torch.full((2, 4, 3), 0.3)
    with torch.no_grad():
        each = torch.vmap(experts)(x, ids, weights)
        for row in range(2):
            expected = experts(x[row], ids[row], weights[row])
            assert each.dtype == expected.dtype == torch.bfloat16
            assert (each[row] - expected).norm() < 0.02 * expected.norm()


@pytest.fixture(scope="module")
def gelu_models(tmp_path_factory):
    return QuantizedModels(tmp_path_factory.mktemp("gelu"), hidden_act="gelu")


@pytest.mark.parametrize("format", ["nf4", "q4_0"])
def test_decoded_experts_equal_the_plain_class(gelu_models, format):
    """With its activation, under transformers' names, and with switchable implementations, alone and under adapters."""
    plain = gelu_models.load(format)
    expected = logits(plain)
    for options in (
        {"target_modules": ["q_proj"]},
        BOTH,
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    ):
        model = lora(gelu_models.load(format), **options)
        assert (logits(model) - expected).abs().max() < 1e-5
        model.dequantize()
        assert (logits(model) - expected).abs().max() < 1e-5
        inner = model.base_model.model
        experts = [module for module in inner.modules() if isinstance(module, OlmoeExperts)]
        assert {type(module) for module in experts} <= {OlmoeExperts, adapted.TrainedExperts}
        assert {type(module.act_fn).__name__ for module in experts} == {"GELUActivation"}
        inner.set_experts_implementation("batched_mm")
        with torch.no_grad():
            assert (model(input_ids=IDS).logits - expected).abs().max() < 1e-4
        inner.set_experts_implementation("eager")
        module, x = experts[0], torch.ones(1, 32)
        ids, weights = torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
        assert torch.equal(module(hidden_states=x, top_k_index=ids, top_k_weights=weights), module(x, ids, weights))


def test_fully_trained_experts_can_switch_implementations(models):
    calls, model = [], stir(lora(models.load("nf4"), target_modules=["q_proj"], modules_to_save=["experts"]), std=0.05)
    expected = logits(model)
    functions = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
    batched = functions["batched_mm"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(type(functions)._global_mapping, "batched_mm", lambda *args: calls.append(1) or batched(*args))
        model.base_model.model.set_experts_implementation("batched_mm")
        assert (logits(model) - expected).abs().max() < 1e-5
    assert len(calls) == 2  # one per layer


@some_formats
@pytest.mark.parametrize(("container", "inside"), [("mlp", "experts"), ("self_attn", "q_proj")])
def test_modules_to_save_that_hold_packed_ones_are_refused(models, format, container, inside):
    """A copy of their codes cannot be trained; torch's own message would only mention dtypes of gradients."""
    with pytest.raises(UserError, match=rf"modules_to_save names .*{inside}.* call dequantize\(\)") as refusal:
        lora(models.load(format), target_modules=["embed_tokens"], modules_to_save=[container])
    assert "\n" not in str(refusal.value)
    lora(models.load(format, dequantize=True), target_modules=["embed_tokens"], modules_to_save=[container])


@pytest.mark.parametrize("format", BLOCKS)
def test_packed_embeddings_are_not_resized(models, format):
    model = models.load(format)
    expected = logits(model)
    for arguments in ({"new_num_tokens": VOCAB_SIZE + 8}, {"pad_to_multiple_of": 64}):
        with pytest.raises(UserError, match=r"packed as \w+, so their .* rows cannot .*; call dequantize\(\)"):
            model.resize_token_embeddings(**arguments)
    model.resize_token_embeddings(VOCAB_SIZE)
    assert torch.equal(logits(model), expected)
    model.dequantize().resize_token_embeddings(VOCAB_SIZE + 8)
    assert model(input_ids=IDS).logits.shape[-1] == VOCAB_SIZE + 8
