"""transformers' quantized key-value caches."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.cache_utils import QuantizedCache

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM

# Sixteen channels per head, and a residual shorter than the text, so that generated tokens are quantized too.
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2}
IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(0))
CACHES = {
    "fp8": {"backend": "fp8"},
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4},
    "hqq": {"backend": "hqq", "nbits": 4, "q_group_size": 16, "residual_length": 4, "axis_key": 1, "axis_value": 1},
}
PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.mark.parametrize("backend", CACHES)
def test_generation_with_a_quantized_cache_equals_transformers(backend):
    if backend in PACKAGES:
        pytest.importorskip(PACKAGES[backend])
    torch.manual_seed(0)
    values = small_config(**SHAPE).to_dict()
    ours = OlmoeForCausalLM(OlmoeConfig(**values)).eval()
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**values)).eval()
    theirs.load_state_dict(ours.state_dict())
    settings = {
        "max_new_tokens": 10, "do_sample": False, "eos_token_id": None,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    quantized = {"cache_implementation": "quantized", "cache_config": CACHES[backend]}
    actual, expected = (model.generate(IDS, **settings, **quantized) for model in (ours, theirs))
    exact = ours.generate(IDS, **settings)
    assert isinstance(actual.past_key_values, QuantizedCache)
    assert torch.equal(actual.sequences, expected.sequences)
    logits = torch.stack(actual.logits)
    assert torch.allclose(logits, torch.stack(expected.logits), atol=1e-3)
    assert not torch.allclose(logits, torch.stack(exact.logits), atol=1e-3)  # it did quantize
