"""`from_pretrained` on folders packed by `olmoe quantize`, and on weights packed while loading."""

from __future__ import annotations

import json

import pytest
import torch

from configurations import VOCAB_SIZE
from olmoe import AutoModel, AutoModelForCausalLM, OlmoeForCausalLM, OlmoeForSequenceClassification
from olmoe.errors import UserError
from olmoe.hf.quantization import PackedConfig
from olmoe.model import causal_attend, set_backend
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from olmoe.weights import checkpoint
from packed_folders import WHOLE, packed_folder

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("hf") / "int4", **WHOLE)


@torch.no_grad()
def logits(model):
    set_backend(model, "torch")
    return model(IDS).logits


def load(folder, cls=OlmoeForCausalLM, **options):
    model, report = cls.from_pretrained(folder, output_loading_info=True, **({"dtype": torch.float32} | options))
    assert not any(report.values())
    return model


CHANGES = [
    pytest.param(WHOLE, id="all packed"),
    pytest.param({}, id="a plain down_proj"),
    pytest.param(WHOLE | {"tie_word_embeddings": True}, id="tied"),
    pytest.param(WHOLE | {"attention_bias": True, "num_key_value_heads": 2}, id="biases"),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_logits_equal_the_engines_and_saving_preserves_the_files(tmp_path, changes):
    model = load(packed_folder(tmp_path / "m", **changes))
    network = checkpoint.load(tmp_path / "m")
    set_backend(network, "torch")
    with torch.inference_mode():
        expected = network.logits(network(IDS, torch.arange(12).expand(2, 12), causal_attend).hidden)
    assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.layers[1].mlp.experts, PackedExperts)
    model.save_pretrained(tmp_path / "again")
    for other in (load(tmp_path / "again"), load(tmp_path / "again", device_map="auto")):
        assert torch.equal(logits(other), logits(model))
        assert other.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    again = checkpoint.load(tmp_path / "again")
    for name, parameter in network.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize("changes", CHANGES)
def test_dequantizing_gives_an_ordinary_model(tmp_path, changes):
    model = load(packed_folder(tmp_path / "m", **changes))
    packed = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(module, PackedModule) for module in plain.modules())
    assert (logits(plain) - packed).abs().max() < 1e-4 * packed.abs().max()
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.allclose(logits(load(tmp_path / "plain")), packed, atol=1e-4 * float(packed.abs().max()))


def test_auto_classes_load_packed_folders_in_half_precision_and_generate(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is OlmoeForCausalLM
    assert model.dtype == torch.bfloat16  # as config.json specifies
    assert model(IDS).logits.dtype == torch.bfloat16
    assert model.is_loaded_in_4bit
    assert model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (2, 17)
    exact = logits(load(folder))
    assert (logits(model).float() - exact).norm() < 0.1 * exact.norm()
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(base.embed_tokens, PackedEmbedding)
    whole = load(folder)
    set_backend(base, "torch")
    set_backend(whole, "torch")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_a_classifier_keeps_its_own_head_plain(folder):
    model = OlmoeForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert not isinstance(model.score, PackedModule)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)


def test_parameter_counts_are_those_of_the_decoded_weights(folder):
    model, plain = load(folder), OlmoeForCausalLM.from_pretrained(folder.with_name("int4-plain"))
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.get_memory_footprint() < 0.4 * plain.get_memory_footprint()


def test_weights_can_be_packed_while_loading(folder, tmp_path):
    plain = folder.with_name("int4-plain")
    config = PackedConfig("q8_0", overrides={"lm_head": "bf16", "*.down_proj": "q4_0"})
    model = load(plain, quantization_config=config)
    assert not isinstance(model.lm_head, PackedModule)
    experts = model.model.layers[0].mlp.experts
    assert {name: format.name for name, format in experts.formats.items()} == {
        "gate_up_proj": "q8_0", "down_proj": "q4_0",
    }  # fmt: skip
    assert model.is_loaded_in_8bit
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_gradients_reach_parameters_that_are_not_packed(folder):
    model = load(folder).train()
    model(IDS, labels=IDS).loss.backward()
    trainable = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in trainable} >= {"gate", "q_norm", "norm"}
    assert not any("proj" in name or "embed" in name for name in trainable)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight_format": "q4_0", "overrides": {"lm_head": "q5"}}, "stores 'lm_head' as 'q5'; choose"),
        ({"weight_format": "q4_0", "skip_modules": ["lm_head"]}, "has neither skip_modules nor double_quant"),
        (
            {"weight_format": "nf4", "overrides": {"lm_head": "q8_0"}},
            "Only q8_0, q5_0, q4_0 support overrides, not nf4",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_contradictory_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PackedConfig(**settings)


def test_a_packed_folder_with_a_missing_tensor_is_refused(folder):
    model = load(folder)
    rest = {k: v for k, v in model.state_dict().items() if k != "model.layers.1.self_attn.q_proj.weight"}
    with pytest.raises(UserError, match="The checkpoint lacks weight"):
        OlmoeForCausalLM.from_pretrained(None, config=model.config, state_dict=rest)
