"""4-bit and 8-bit loading: what is packed, its size and results, saving and loading."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig
from transformers.integrations.moe import ExpertsInterface

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification, OlmoeModel
from olmoe.errors import UserError
from olmoe.hf.quantization import PackedConfig, pack
from olmoe.quant import PackedExperts, PackedLinear, PackedModule

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
KINDS = [NF4, {"load_in_4bit": True}, {"load_in_8bit": True}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["nf4-double", "fp4", "int8"])
IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(0))
# OLMoE-1B-7B with every width and the vocabulary divided by 16, and a quarter of the layers: embeddings and
# head are 3 % of the weights, experts 93 %.
PROPORTIONAL = {
    "vocab_size": 786, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_experts": 64, "num_experts_per_tok": 8, "eos_token_id": 785,
}  # fmt: skip


def save_random(folder, **changes):
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**small_config(**changes).to_dict())).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("plain"))


def load(folder, kind=NF4, cls=OlmoeForCausalLM, **options):
    settings = {"dtype": torch.float32} | options
    return cls.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**kind), **settings)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@every_kind
def test_only_experts_and_attention_are_packed(folder, kind):
    model = load(folder, kind)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedModule)}
    attention = {f"self_attn.{which}_proj" for which in "qkvo"}
    assert packed == {f"model.layers.{i}.{name}" for i in range(2) for name in attention | {"mlp.experts"}}
    plain = OlmoeForCausalLM.from_pretrained(folder).state_dict()
    kept = [n for n in plain if any(part in n for part in ("norm", "mlp.gate.", "embed_tokens", "lm_head"))]
    assert len(kept) == 2 * 5 + 3
    assert all(torch.equal(model.state_dict()[name], plain[name]) for name in kept)


@every_kind
def test_logits_equal_those_of_the_dequantized_weights(folder, kind):
    model = load(folder, kind)
    quantized, plain = logits(model), copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, PackedModule) for module in plain.modules())
    reference = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**small_config().to_dict())).eval()
    reference.load_state_dict(plain.state_dict())
    for other in (plain, reference):
        assert (logits(other) - quantized).abs().max() < 1e-5 * quantized.abs().max()
    exact = logits(OlmoeForCausalLM.from_pretrained(folder))
    assert 0 < (exact - quantized).square().mean() < 0.2 * exact.square().mean()  # rounded, not broken


@every_kind
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_saving_and_loading_a_quantized_model_changes_nothing(folder, kind, device_map, tmp_path):
    model = load(folder, kind, device_map=device_map)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, report = OlmoeForCausalLM.from_pretrained(tmp_path, device_map=device_map, output_loading_info=True)
    assert not any(report.values())
    assert again.get_memory_footprint() == model.get_memory_footprint()
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
        assert again.state_dict()[name].dtype == value.dtype, name
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(IDS, **settings), model.generate(IDS, **settings))
    assert torch.equal(logits(again), logits(model))


def test_experts_implementations_apply_to_packed_experts_only_after_dequantizing(folder, monkeypatch):
    model = load(folder, experts_implementation="grouped_mm")
    expected = logits(model)
    assert torch.equal(expected, logits(load(folder)))
    called = []
    computed = ExpertsInterface._global_mapping["grouped_mm"]
    monkeypatch.setitem(
        ExpertsInterface._global_mapping, "grouped_mm", lambda *args: called.append(1) or computed(*args)
    )
    logits(model)
    assert not called
    model.dequantize()
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert called


def test_generation_equals_the_dequantized_model(folder):
    model = load(folder)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(IDS, **settings)
    assert torch.equal(tokens, model.dequantize().generate(IDS, **settings))


def test_a_dequantized_model_saves_like_one_that_was_never_quantized(folder, tmp_path):
    model = load(folder).dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    theirs = transformers.OlmoeForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "most"), [(NF4, 0.29), ({"load_in_4bit": True}, 0.32), ({"load_in_8bit": True}, 0.54)], ids=str
)
def test_memory_footprint_with_olmoes_proportions(tmp_path, kind, most):
    torch.manual_seed(0)
    plain = OlmoeForCausalLM(OlmoeConfig(**PROPORTIONAL)).to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, kind, dtype="auto", device_map="auto", attn_implementation="sdpa")
    assert model.dtype == torch.bfloat16
    assert model.get_memory_footprint() <= most * plain.get_memory_footprint()
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    model.save_pretrained(tmp_path / "packed")
    packed_files = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert packed_files <= (most + 0.01) * files


def test_memory_footprint_of_olmoe_1b_7b():
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024)).to(torch.bfloat16)
    plain = model.get_memory_footprint()
    assert plain == pytest.approx(13.84e9, rel=1e-3)
    pack(model, PackedConfig("nf4", double_quant=True), ["lm_head"])
    assert model.get_memory_footprint() <= 0.281 * plain
    assert model.num_parameters() == pytest.approx(6.92e9, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_are_quantized(folder, dtype):
    model = load(folder, NF4 | {"bnb_4bit_compute_dtype": dtype}, dtype=dtype)
    quantized = logits(model)
    assert quantized.dtype == dtype
    expected = logits(model.dequantize())
    tolerance = 2 * torch.finfo(dtype).eps  # an expert's hidden layer is rounded once more
    assert (quantized - expected).float().norm() < 4 * tolerance * expected.float().norm()


def test_at_most_one_weight_is_unpacked_at_a_time(folder, monkeypatch):
    seen, encode = [], PackedModule.encode

    def watch(self, name, weight):
        assert not [n for n, reference in seen if reference() is not None]
        seen.append((name, weakref.ref(weight)))
        return encode(self, name, weight)

    monkeypatch.setattr(PackedModule, "encode", watch)
    load(folder)
    assert len(seen) == 2 * (4 + 2)


def test_unusual_configurations_are_quantized(tmp_path):
    """Biases, tied embeddings, grouped keys, and widths that are not a multiple of a block."""
    changes = {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 2, "intermediate_size": 5}
    model = load(save_random(tmp_path, **changes))
    model.save_pretrained(tmp_path / "packed")
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))
    assert torch.allclose(logits(again.dequantize()), logits(model), atol=1e-5)


def test_base_model_and_classifier_load_packed_files(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path)
    base = OlmoeModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    classifier = load(folder, cls=OlmoeForSequenceClassification, num_labels=3)
    assert not isinstance(classifier.score, PackedModule)
    assert classifier(IDS).logits.shape == (2, 3)


def test_skipped_modules_stay_plain_after_reloading(folder, tmp_path):
    model = load(folder, NF4 | {"llm_int8_skip_modules": ["lm_head", "layers.0.mlp.experts", "q_proj"]})
    model.save_pretrained(tmp_path)
    for m in (model, OlmoeForCausalLM.from_pretrained(tmp_path)):
        first, second = m.model.layers
        assert not isinstance(first.mlp.experts, PackedExperts)
        assert isinstance(second.mlp.experts, PackedExperts)
        assert not isinstance(second.self_attn.q_proj, PackedLinear)
        assert isinstance(second.self_attn.k_proj, PackedLinear)
    assert torch.equal(logits(m), logits(model))


def test_gradients_equal_those_of_the_dequantized_model(folder):
    model = load(folder)
    plain = copy.deepcopy(model).dequantize()
    for m in (model, plain):
        m.train()(IDS, labels=IDS, output_router_logits=True).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trainable} >= {"gate", "embed_tokens", "lm_head", "q_norm"}
    for name, parameter in trainable.items():
        expected = plain.get_parameter(name).grad
        assert (parameter.grad - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_qlora_trains_adapters_on_a_packed_model_and_merges_after_dequantizing(folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = peft.prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    adapted = logits(model.eval())
    model.base_model.model.dequantize()
    assert torch.allclose(logits(model.merge_and_unload()), adapted, atol=1e-4)


def test_bitsandbytes_is_not_needed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    model = load(folder, device_map="auto")
    assert model.num_parameters() == OlmoeForCausalLM.from_pretrained(folder).num_parameters()
    assert model.is_loaded_in_4bit


def test_the_documented_example_runs(folder):
    from olmoe import AutoModelForCausalLM, BitsAndBytesConfig, infer_device

    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )
    device = infer_device()
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype="auto", device_map="auto", quantization_config=quantization_config
    ).to(device)
    assert isinstance(model, OlmoeForCausalLM)
    assert all(isinstance(layer.mlp.experts, PackedExperts) for layer in model.model.layers)
    assert model.generate(IDS.to(device), max_length=20).shape[1] <= 20


def test_settings_may_be_a_dictionary(folder):
    settings = {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    model = OlmoeForCausalLM.from_pretrained(folder, quantization_config=settings)
    assert model.config.quantization_config.to_dict() == {
        "quant_method": "olmoe",
        "weight_format": "int8",
        "double_quant": False,
        "compute_dtype": None,
        "skip_modules": ["lm_head"],
    }
    assert isinstance(model.config.quantization_config, BitsAndBytesConfig)
    assert model.is_loaded_in_8bit


def test_quantizing_a_quantized_model_again_warns(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(tmp_path, {"load_in_8bit": True})
    assert model.config.quantization_config.weight_format == "nf4"


def test_packed_models_can_be_moved_but_not_cast(folder):
    model = load(folder)
    with pytest.raises(ValueError, match="cannot cast"):
        model.to(torch.float16)
    with pytest.raises(ValueError, match="not supported"):
        model.half()
    assert model.to("cpu") is model


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "asks for neither load_in_4bit nor load_in_8bit; set one"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "'nf3' is unknown; choose nf4 or fp4"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.int8},
            "'int8' is not one that models compute in; choose",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, "stored as torch.uint8, so leave it out"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "GPU training; leave it out"),
        ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, "ours run on both, so leave it out"),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_settings_are_refused(folder, settings, sentence):
    with pytest.raises(UserError, match=sentence) as refusal:
        load(folder, settings)
    assert "\n" not in str(refusal.value)


def test_files_of_another_format_version_are_refused(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, sentence in (
        ({"weight_format": "nf5"}, "weight format 'nf5' is unknown; choose nf4 or fp4 or int8"),
        ({"group_size": 32}, "'group_size', which this version of olmoe does not know"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=sentence):
            OlmoeForCausalLM.from_pretrained(tmp_path)


def test_transformers_own_classes_refuse_packed_files(folder, tmp_path):
    load(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="OlmoeForCausalLM cannot load weights that olmoe packed"):
        transformers.OlmoeForCausalLM.from_pretrained(tmp_path)


def test_files_quantized_by_bitsandbytes_are_refused(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    stock = transformers.OlmoeForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**NF4), device_map="cpu"
    )
    stock.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="quantized by bitsandbytes itself; load the unquantized one"):
        OlmoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("lost", ["self_attn.q_proj.weight", "mlp.experts.down_proj"])
def test_incomplete_checkpoints_are_refused(folder, lost):
    plain, packed = OlmoeForCausalLM.from_pretrained(folder), load(folder)
    for model, options in ((plain, {"quantization_config": BitsAndBytesConfig(**NF4)}), (packed, {})):
        rest = {name: value for name, value in model.state_dict().items() if name != f"model.layers.1.{lost}"}
        with pytest.raises(UserError, match=f"The checkpoint lacks {lost.split('.')[-1]} "):
            OlmoeForCausalLM.from_pretrained(None, config=model.config, state_dict=rest, **options)


def test_a_weight_of_another_shape_is_refused(folder):
    """Even one with the same number of weights, which would fill the same blocks."""
    plain = OlmoeForCausalLM.from_pretrained(folder)
    for name, shape in (("self_attn.k_proj.weight", (16, 64)), ("mlp.experts.down_proj", (8, 12, 32))):
        state = plain.state_dict() | {f"model.layers.0.{name}": torch.zeros(shape)}
        with pytest.raises(RuntimeError):
            load(None, config=plain.config, state_dict=state)


def test_state_dicts_in_memory_and_the_fused_layout_are_quantized(folder, tmp_path):
    plain, expected = OlmoeForCausalLM.from_pretrained(folder), logits(load(folder))
    plain.save_pretrained(tmp_path, save_original_format=False)
    assert torch.equal(logits(load(tmp_path)), expected)
    assert torch.equal(logits(load(None, config=plain.config, state_dict=plain.state_dict())), expected)


OFFLOADED = {"model.layers.1": "disk"} | dict.fromkeys(
    ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
)


def test_packed_files_can_be_offloaded_to_disk_and_plain_ones_are_refused(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "packed")
    offload = {"device_map": OFFLOADED, "offload_folder": tmp_path / "offload"}
    offloaded = OlmoeForCausalLM.from_pretrained(tmp_path / "packed", **offload)
    assert offloaded.model.layers[1].mlp.experts.gate_up_proj.is_meta
    assert torch.equal(logits(offloaded), logits(model))
    with pytest.raises(UserError, match="partly offloaded cannot be dequantized"):
        offloaded.dequantize()
    with pytest.raises(UserError, match="on their way to disk; load the model without offloading"):
        load(folder, **offload)


def test_importing_registers_nothing():
    code = (
        "import olmoe.hf.quantization; from transformers.quantizers import auto;"
        "print('olmoe' in auto.AUTO_QUANTIZER_MAPPING or 'olmoe' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
