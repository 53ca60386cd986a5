"""An OLMo folder is read as the model that transformers computes."""

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from olmoe.errors import CheckpointError, ConfigError
from olmoe.model import causal_attend
from olmoe.weights.dense import OlmoFolder

torch.manual_seed(0)


def save(folder, **options):
    config = OlmoConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1, eos_token_id=96, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    model = OlmoForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # means that are not zero, so that centring shows
            parameter.add_(0.05 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def logits_of(model, ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model.logits(model(ids, positions, causal_attend).hidden)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}, {"attention_bias": True}, {"clip_qkv": 0.5}],
    ids=["plain", "tied", "grouped", "bias", "clipped"],
)
def test_the_dense_model_is_transformers(tmp_path, options):
    reference = save(tmp_path, **options)
    ids = torch.randint(0, 97, (2, 40))
    model = OlmoFolder(tmp_path).dense_model()
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(model, ids), reference(ids).logits, rtol=1e-4, atol=2e-5)


def test_norms_of_queries_and_keys_keep_their_size(tmp_path):
    save(tmp_path)
    source = OlmoFolder(tmp_path)
    ids = torch.randint(0, 97, (60,)).tolist()
    source.fit_norms(ids, 32)
    seen = []
    model = source.dense_model()
    model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda m, i, o: seen.append(o.square().mean(-1) ** 0.5)
    )
    with torch.inference_mode():
        for start in (0, 32):
            part = torch.tensor([ids[start : start + 32]])
            model(part, torch.arange(part.shape[1]).expand_as(part), causal_attend)
    expected = torch.cat([row.flatten() for row in seen]).mean()
    weight = source.read("model.layers.1.self_attn.k_norm.weight")
    assert weight.shape == (32,)
    torch.testing.assert_close(weight, expected.expand(32))


def test_other_models_are_refused(tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"model type 'llama'.*OLMo"):
        OlmoFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks .*up_proj"),
        (lambda t: t.update({"model.layers.0.mlp.bias": torch.zeros(3)}), r"holds .*mlp\.bias"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(97, 31)}), r"lm_head.*shape \[97, 31\]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_broken_folders_are_refused(tmp_path, change, message):
    from safetensors.torch import load_file, save_file

    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        OlmoFolder(tmp_path)
