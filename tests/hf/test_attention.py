"""Every kind of RoPE that transformers knows, and attention implementations that cannot run here."""

from __future__ import annotations

import pytest
import torch
import transformers

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM

KINDS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def settings(kind):
    values = small_config(max_position_embeddings=32 if kind == "dynamic" else 128).to_dict()
    values["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0} | KINDS[kind]
    for old in ("rope_theta", "rope_scaling"):
        del values[old]
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rope_equals_transformers_on_short_and_long_sequences(kind):
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**settings(kind))).eval()
    theirs.set_experts_implementation("eager")
    ours = OlmoeForCausalLM(OlmoeConfig(**settings(kind))).eval()
    ours.load_state_dict(theirs.state_dict())
    for length in (8, 48, 16):  # within the original context, beyond it, and back
        ids = torch.randint(2, VOCAB_SIZE - 1, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, logits = theirs(ids).logits, ours(ids).logits
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5, length


def test_the_older_rope_spelling_is_equivalent():
    old = settings("linear")
    parameters = old.pop("rope_parameters")
    old |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": parameters["factor"]}}
    config = OlmoeConfig(**old)
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == 2.0
    assert config.rope_parameters["rope_theta"] == 500.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may be able to run here")
def test_flash_attention_is_refused_with_the_reason():
    with pytest.raises((ImportError, ValueError), match="(?i)flash"):
        OlmoeForCausalLM(OlmoeConfig(**small_config().to_dict(), attn_implementation="flash_attention_2"))


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="telepathy"):
        OlmoeForCausalLM(OlmoeConfig(**small_config().to_dict(), attn_implementation="telepathy"))
