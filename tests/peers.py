"""Our model and transformers' own with the same weights, for tests that treat both alike and compare."""

from __future__ import annotations

import torch
import transformers

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 10), generator=torch.Generator().manual_seed(1))


def peers(attention="sdpa", **changes):
    """Ours, theirs."""
    torch.manual_seed(0)
    settings = small_config(**changes).to_dict()
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**settings, attn_implementation=attention)).eval()
    theirs.set_experts_implementation("eager")
    ours = OlmoeForCausalLM(OlmoeConfig(**settings, attn_implementation=attention)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def difference(a, b):
    """The largest relative one."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-12))


def decoded(model, ids=IDS, tokens=4, **options):
    """Logits of a prompt and of single tokens after it, with a cache and without gradients: the way of the kernels."""
    found = []
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        for part in (ids, *ids[:, :tokens].split(1, dim=1)):
            found.append(model(part, cache=cache, use_cache=True, **options).logits)
    return torch.cat(found, dim=1)


def in_every_way(model, ids=IDS):
    """Logits with gradients, of a prompt and steps through the kernels, and of greedy generation."""
    plain = model(ids, use_cache=False).logits
    text = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        return [plain.detach(), decoded(model, ids), model(text, use_cache=False).logits]


def assert_alike(ours, theirs, tolerance=2e-5):
    """The same results in every way."""
    for a, b in zip(in_every_way(ours), in_every_way(theirs), strict=True):
        assert difference(a, b) < tolerance
