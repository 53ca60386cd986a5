"""`register()` puts our classes behind transformers' own names, and `unregister()` removes them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import olmoe
import olmoe.hf
from configurations import small_config
from packed_folders import WHOLE, packed_folder

SETTINGS = small_config().to_dict()


@pytest.fixture
def registered():
    olmoe.hf.register()
    yield
    olmoe.hf.unregister()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_file):
    """As on the hub: one tensor per expert, written by transformers."""
    folder = tmp_path_factory.mktemp("hub")
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SETTINGS)).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


def tables():
    autos = (transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification)
    configs = (olmoe.OlmoeConfig, transformers.OlmoeConfig)
    return [
        *(auto._model_mapping.get(config, None) for auto in autos for config in configs),
        type(transformers.AutoConfig.for_model("olmoe")),
        AUTO_QUANTIZER_MAPPING.get("olmoe"),
        AUTO_QUANTIZATION_CONFIG_MAPPING.get("olmoe"),
        "olmoe" in ALL_EXPERTS_FUNCTIONS,
    ]


def test_transformers_auto_classes_give_ours(registered, checkpoint):
    assert type(transformers.AutoConfig.from_pretrained(checkpoint)) is olmoe.OlmoeConfig
    assert type(transformers.AutoModel.from_pretrained(checkpoint)) is olmoe.OlmoeModel
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert type(classifier) is olmoe.OlmoeForSequenceClassification
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model) is olmoe.OlmoeForCausalLM
    # Checkpoint conversion (experts stacked on loading) applies to ours as to transformers' own class.
    theirs = transformers.OlmoeForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in theirs.state_dict().items())
    plain = transformers.OlmoeConfig(**SETTINGS)
    assert type(transformers.AutoModelForCausalLM.from_config(plain)) is olmoe.OlmoeForCausalLM
    assert transformers.AutoTokenizer.from_pretrained(checkpoint).eos_token == "<|endoftext|>"


def test_transformers_pipeline_runs_ours(registered, checkpoint):
    generate = transformers.pipeline("text-generation", model=str(checkpoint), device="cpu")
    assert type(generate.model) is olmoe.OlmoeForCausalLM
    assert generate("the dog", max_new_tokens=2)[0]["generated_text"].startswith("the dog")


def test_unregister_restores_everything_and_both_are_idempotent():
    before = tables()
    assert before[-1] is False
    olmoe.hf.register()
    once = tables()
    assert once != before
    olmoe.hf.register()
    assert tables() == once
    olmoe.hf.unregister()
    assert tables() == before
    olmoe.hf.unregister()
    assert tables() == before


def test_earlier_registrations_of_other_packages_are_restored():
    class Theirs(transformers.OlmoeForCausalLM):
        pass

    mapping = transformers.AutoModelForCausalLM._model_mapping
    transformers.AutoModelForCausalLM.register(transformers.OlmoeConfig, Theirs, exist_ok=True)
    try:
        olmoe.hf.register()
        assert mapping[transformers.OlmoeConfig] is olmoe.OlmoeForCausalLM
        olmoe.hf.unregister()
        assert mapping[transformers.OlmoeConfig] is Theirs
    finally:
        del mapping._extra_content[transformers.OlmoeConfig]


# In a separate process, because the first `from_pretrained` of any of our classes also registers packed folders.
PACKED = """
import json, sys, torch, transformers
import olmoe.hf
olmoe.hf.register()
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig
folder, found = sys.argv[1], []
config = transformers.AutoConfig.from_pretrained(folder)
found.append(type(AutoQuantizationConfig.from_dict(config.quantization_config)).__name__)
if sys.argv[2] == "lm_eval":
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=folder, device="cpu").model
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
found += [type(model).__module__, type(model.model.layers[0].mlp.experts).__name__]
found.append(bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()))
olmoe.hf.unregister()
found.append("olmoe" in AUTO_QUANTIZATION_CONFIG_MAPPING)
print(json.dumps(found))
"""


@pytest.mark.parametrize("who", ["auto class", "lm_eval"])
def test_packed_folders_load_in_code_that_only_uses_transformers(tmp_path, tokenizer_file, who):
    if who == "lm_eval":
        pytest.importorskip("lm_eval")
    folder = packed_folder(tmp_path / "m", "int4", tokenizer_file, **WHOLE)
    done = subprocess.run([sys.executable, "-c", PACKED, folder, who], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == ["PackedConfig", "olmoe.hf.model", "PackedExperts", True, False]
