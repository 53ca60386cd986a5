"""Every PEFT method on quantized models: the results on decoded weights, or a refusal when attached."""

from __future__ import annotations

import copy

import pytest
import torch

from olmoe.errors import UserError
from olmoe.quant import PackedModule
from quantized_models import IDS, QuantizedModels, logits, stir, trained

peft = pytest.importorskip("peft")
METHODS = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
PROMPT = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
# Settings where defaults are missing or do not fit a model of this size.
SETTINGS = {
    "ADALORA": TARGETS | {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"},
    "BOFT": TARGETS | {"boft_block_size": 8},
    "C3A": TARGETS | {"block_size": 8},
    "CARTRIDGE": PROMPT,
    "CPT": {
        "task_type": "CAUSAL_LM", "cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1] * 4,
        "cpt_tokens_type_mask": [1, 2, 3, 4],
    },
    "FOURIERFT": TARGETS | {"n_frequency": 8},
    "IA3": TARGETS | {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": TARGETS | {"r": 4},
    "MULTITASK_PROMPT_TUNING": PROMPT | {"num_tasks": 2},
    "OFT": TARGETS | {"oft_block_size": 8},
    "POLY": TARGETS | {"r": 2, "n_tasks": 2, "n_skills": 2, "task_type": "CAUSAL_LM"},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT | {"encoder_hidden_size": 16},
    "RANDLORA": TARGETS | {"r": 4},
    "ROAD": TARGETS | {"group_size": 8},
    "SHADOW": {"task_type": "CAUSAL_LM"},
    "SHIRA": TARGETS | {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": IDS[0, :3].tolist()},
    "VBLORA": TARGETS | {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2},
    "VERA": TARGETS | {"r": 4},
    "WAVEFT": TARGETS | {"n_frequency": 8},
    "XLORA": {"task_type": "CAUSAL_LM", "hidden_size": 32},
}  # fmt: skip
# Arguments of each call besides ids.
INPUTS = {
    "CPT": {"input_type_mask": torch.ones_like(IDS)},
    "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([0, 1])},
    "POLY": {"task_ids": torch.tensor([0, 1])},
}
# Methods that PEFT itself refuses for OLMoE, even unquantized.
UNSUPPORTED = {"ADAPTION_PROMPT": "Unsupported model type", "GLORA": "not a plain torch.nn.Linear"}
# Methods that read a dtype from packed weights.
REFUSED = {(m, "q4_0"): r"takes its dtype from.*; call dequantize\(\) on the model first" for m in ("SHADOW", "XLORA")}
# Methods whose `merge_and_unload` PEFT lacks or refuses.
WITHOUT_MERGE = {
    "BEFT": "no bias", "IA3": "Cannot merge ia3 layers when the model is loaded in", "LILY": "not supported",
    "POLY": "", "SHADOW": "cannot be merged", "XLORA": "",
}  # fmt: skip
# Methods that adapt only modules that are not packed in these models.
PLAIN = {("LN_TUNING", "nf4"), ("LN_TUNING", "int8"), ("LN_TUNING", "q4_0")}
PLAIN |= {("TRAINABLE_TOKENS", "nf4"), ("TRAINABLE_TOKENS", "int8")}
FORMATS = ("nf4", "int8", "q4_0")
every_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = QuantizedModels(folder)
    for name in ("0", "1"):  # the adapters that X-LoRA mixes
        model = stir(peft.get_peft_model(made.load("nf4"), peft.LoraConfig(r=2, **TARGETS)), seed=int(name))
        model.save_pretrained(folder / name)
    SETTINGS["XLORA"]["adapters"] = {name: str(folder / name) for name in ("0", "1")}
    return made


def adapted(model, method, **changes):
    torch.manual_seed(0)
    model.config.use_cache = method != "XLORA"  # as it requires
    config = METHODS[method](**(SETTINGS.get(method, TARGETS) | changes))
    return stir(peft.get_peft_model(model, config), std=0.1)


def results(model, method):
    model.forward = bound(model.forward, INPUTS.get(method, {}))
    return trained(model)


def bound(forward, inputs):
    return lambda *args, **kwargs: forward(*args, **(kwargs | inputs))


def close(given, expected):
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert (given[name] is None) == (value is None), name
        if value is not None:
            assert torch.isfinite(value).all(), name
            assert (given[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1), name


@every_format
@pytest.mark.parametrize("method", [m.value for m in METHODS])
def test_methods_give_the_results_on_decoded_weights_or_are_refused(models, format, method):
    model = models.load(format)
    base, refusal = logits(model), UNSUPPORTED.get(method) or REFUSED.get((method, format))
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal) as error:
            adapted(model, method)
        assert "\n" not in str(error.value)
        assert torch.equal(logits(model), base)
        return
    given = results(adapted(model, method), method)
    expected = results(adapted(models.load(format, dequantize=True), method), method)
    close(given, expected)
    assert any(g is not None and g.abs().max() > 0 for name, g in given.items() if name != "logits")
    if given["logits"].shape == base.shape:
        assert (given["logits"] - base).abs().max() > 1e-3


@every_format
@pytest.mark.parametrize("method", [m.value for m in METHODS if m.value not in UNSUPPORTED and m.value != "XLORA"])
def test_merging_is_correct_or_refused_and_correct_after_dequantizing(models, format, method):
    if (method, format) in REFUSED:
        pytest.skip("refused when attached")
    model = adapted(models.load(format), method)
    if not hasattr(model, "merge_and_unload") or model.active_peft_config.is_prompt_learning:
        return
    expected = logits(model) if method not in INPUTS else None
    if (method, format) in PLAIN:
        assert (logits(model.merge_and_unload()) - expected).abs().max() < 1e-5
        return
    refusal = WITHOUT_MERGE.get(
        method, r"packed as \w+ and cannot be changed.*; call dequantize\(\) on the model first"
    )
    with pytest.raises((UserError, ValueError, NotImplementedError), match=refusal) as error:
        copy.deepcopy(model).merge_and_unload()
    assert "\n" not in str(error.value)
    if method in ("BEFT", "LILY", "POLY", "SHADOW"):
        return
    model.get_base_model().dequantize()
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    assert (logits(model) - expected).abs().max() < 1e-4
    assert (logits(model.merge_and_unload()) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["LORA", "LOHA", "LOKR", "VERA", "SHIRA", "HIRA", "MISS", "OFT", "BOFT", "HRA"])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]], ids=str)
def test_methods_on_packed_embeddings(models, method, targets):
    """They behave as on the dequantized model, including PEFT's own errors."""
    seen = []
    for dequantize in (False, True):
        try:
            seen.append(results(adapted(models.load("q4_0", dequantize), method, target_modules=targets), method))
        except (ValueError, TypeError) as error:
            seen.append(type(error))
    assert isinstance(seen[0], type) == isinstance(seen[1], type)
    if isinstance(seen[0], dict):
        close(*seen)


@every_format
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_starting_points_that_change_the_weights_are_refused(models, format, start):
    with pytest.raises(UserError, match=r"starting them from another weight; call dequantize\(\)"):
        adapted(models.load(format), "LORA", init_lora_weights=start)


@every_format
@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "orthogonal"}, {"bias": "lora_only"}])
def test_variants_of_lora(models, format, options):
    close(*[results(adapted(models.load(format, d), "LORA", **options), "LORA") for d in (False, True)])
