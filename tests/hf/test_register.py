"""`register()` puts our classes behind transformers' own names, and `unregister()` takes them away."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import olmoe
import olmoe.hf
from configurations import small_config

SETTINGS = small_config().to_dict()


@pytest.fixture
def registered():
    olmoe.hf.register()
    yield
    olmoe.hf.unregister()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_file):
    """As on the hub: one tensor an expert, written by transformers."""
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


def test_unregister_restores_everything_and_both_may_be_repeated():
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


def test_what_another_package_registered_before_comes_back():
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
