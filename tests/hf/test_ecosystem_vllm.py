"""What vLLM gets from transformers for an exported folder: configuration, tokenizer, and the model as a fallback."""

from __future__ import annotations

import pytest
import torch
import transformers

import olmoe
from configurations import small_config
from olmoe.weights import checkpoint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.to_folder import to_folder
from packed_folders import WHOLE, decoded, packed_folder
from vllm_names import check_for_vllm


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_transformers_alone_loads_an_exported_packed_folder(tmp_path, tokenizer_file, recipe):
    packed = packed_folder(tmp_path / "packed", recipe, tokenizer_file, **WHOLE)
    to_folder(open_source(packed), out := tmp_path / "out", torch.float32)
    config = transformers.AutoConfig.from_pretrained(out)
    assert type(config) is transformers.OlmoeConfig  # not ours: nothing has been registered
    assert config.rope_parameters["rope_theta"] == 10000.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "Once upon a time there was a little girl."
    ids = tokenizer(text)["input_ids"]
    assert ids == olmoe.tokenizer.Tokenizer.from_folder(packed).encode(text)
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (319, 128)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is transformers.OlmoeForCausalLM
    positions = torch.arange(len(ids))[None]
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits
        plain = decoded(checkpoint.load(packed))
        hidden = plain(torch.tensor([ids]), positions, olmoe.model.causal_attend).hidden
        torch.testing.assert_close(found, plain.logits(hidden), atol=2e-4, rtol=1e-4)


def test_a_model_saved_by_trainer_is_readable_by_vllm(tmp_path):
    """`save_pretrained` writes one tensor per expert, like transformers' own class."""
    config = olmoe.OlmoeConfig(**small_config(tie_word_embeddings=False).to_dict())
    olmoe.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    check_for_vllm(tmp_path)


def test_a_model_quantized_on_loading_exports_after_dequantizing(tmp_path):
    config = olmoe.OlmoeConfig(**small_config(**WHOLE).to_dict())
    olmoe.OlmoeForCausalLM(config).save_pretrained(tmp_path / "plain")
    quantization = olmoe.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = olmoe.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=quantization)
    model.dequantize()
    model.save_pretrained(tmp_path / "out")
    check_for_vllm(tmp_path / "out")
