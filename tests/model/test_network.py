"""The network against transformers' own OlmoeForCausalLM on shared random weights.

Bounds of the project: logits and router logits to 1e-5 relative in fp32, every gradient to 1e-4, and
identical greedy continuations of 64 tokens, with a cache and without.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from configurations import CASES, VOCAB_SIZE, Case, small_config
from olmoe import ops
from olmoe.config import ModelConfig
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import ConfigError
from olmoe.model import ACTIVATIONS, CausalLM, activation, causal_attend, initialize, set_backend

LOGITS, GRADIENTS = 1e-5, 1e-4


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12))


def pair(case: Case) -> tuple[CausalLM, OlmoeForCausalLM]:
    """Our network and transformers' with the same random weights."""
    config = small_config(**case.changes)
    theirs = OlmoeForCausalLM(OlmoeConfig(**config.to_dict(), attn_implementation="eager")).eval()
    theirs.set_experts_implementation("eager")  # transformers' own loop: its grouped product refuses odd widths
    ours = CausalLM(config).eval()
    initialize(ours, seed=1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:  # norms and biases away from their trivial start
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    return ours, theirs


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB_SIZE - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_router_logits_and_gradients_equal_transformers(case):
    ours, theirs = pair(case)
    ids = tokens(2, case.tokens)
    positions = torch.arange(case.tokens).expand(2, -1)

    expected = theirs(ids, output_router_logits=True)
    output = ours(ids, positions, causal_attend)
    logits = ours.logits(output.hidden)
    assert relative(logits, expected.logits) < LOGITS
    for router, reference in zip(output.routers, expected.router_logits, strict=True):
        assert relative(router.logits, reference.view_as(router.logits)) < LOGITS

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * direction).sum().backward()
    (expected.logits * direction).sum().backward()
    references = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, references[name].grad) < GRADIENTS, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_equals_transformers(side):
    ours, theirs = pair(CASES[0])
    length, lengths = 12, [12, 7]
    ids, mask = tokens(2, length), torch.zeros(2, length, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, slice(length - n, None) if side == "left" else slice(0, n)] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)

    def attend(q, k, v, layer):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ops.attention(q, k, v, mask[:, None, None, :], causal=True).transpose(1, 2)

    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    logits = ours.logits(ours(ids, positions, attend).hidden)
    assert relative(logits[mask], expected[mask]) < LOGITS
    alone = ids[1][mask[1]].unsqueeze(0)
    unpadded = ours.logits(ours(alone, torch.arange(lengths[1]).unsqueeze(0), causal_attend).hidden)
    assert relative(logits[1][mask[1]], unpadded[0]) < LOGITS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_continuations_equal_transformers_with_and_without_cache(case, tokenizer):
    ours, theirs = pair(case)
    prompt = tokens(1, 12 if case.tokens > 1 else 1, seed=5)
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    mask = torch.ones_like(prompt)
    cached = theirs.generate(prompt, attention_mask=mask, use_cache=True, **settings)[0, prompt.shape[1] :]
    recomputed = theirs.generate(prompt, attention_mask=mask, use_cache=False, **settings)[0, prompt.shape[1] :]

    llm = LLM.from_parts(ours, tokenizer)
    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    assert llm.generate(prompt[0].tolist(), params)[0].token_ids == cached.tolist()

    sequence = prompt
    with torch.inference_mode():
        for _ in range(64):
            positions = torch.arange(sequence.shape[1]).unsqueeze(0)
            hidden = ours(sequence, positions, causal_attend).hidden
            sequence = torch.cat((sequence, ours.logits(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1)
    assert sequence[0, prompt.shape[1] :].tolist() == recomputed.tolist()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_backend_computes_the_same_network(backend):
    ours, _ = pair(CASES[0])
    ids, positions = tokens(2, 16), torch.arange(16).expand(2, -1)
    expected = ours.logits(ours(ids, positions, causal_attend).hidden)
    set_backend(ours, backend)
    assert relative(ours.logits(ours(ids, positions, causal_attend).hidden), expected) < LOGITS


def test_flat_tokens_give_what_a_batch_gives():
    """The engine runs (N, D), the trainer (B, T, D): the modules must not care."""
    ours, _ = pair(CASES[0])
    ids, positions = tokens(1, 10), torch.arange(10).unsqueeze(0)

    def attend_flat(q, k, v, layer):
        return causal_attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), layer).squeeze(0)

    batched = ours(ids, positions, causal_attend).hidden[0]
    assert relative(ours(ids[0], positions[0], attend_flat).hidden, batched) < LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_fp32_and_routes_in_fp32(dtype):
    ours, _ = pair(CASES[0])
    ids, positions = tokens(2, 16), torch.arange(16).expand(2, -1)
    expected = ours.logits(ours(ids, positions, causal_attend).hidden)
    with torch.inference_mode():
        output = ours.to(dtype)(ids, positions, causal_attend)
        logits = ours.logits(output.hidden)
    assert logits.dtype == dtype
    assert all(r.logits.dtype == r.weights.dtype == torch.float32 for r in output.routers)
    # One wrongly routed token may differ much; most must not.
    difference = (logits.float() - expected).abs().amax(-1) / expected.abs().max()
    assert difference.median() < 0.05


def test_weights_are_not_renormalised_unless_asked():
    for renormalised in (False, True):
        ours = CausalLM(small_config(norm_topk_prob=renormalised))
        initialize(ours, 0)
        routers = ours(tokens(1, 8), torch.arange(8).unsqueeze(0), causal_attend).routers
        sums = torch.stack([r.weights.sum(-1) for r in routers])
        assert torch.allclose(sums, torch.ones_like(sums)) == renormalised
        assert renormalised or (sums < 1).all()


def test_initialization_follows_the_training_code():
    config = small_config(hidden_size=64, initializer_range=0.02)
    model = CausalLM(config).requires_grad_(False)
    initialize(model, seed=6198)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 3 * 0.02, name
            assert parameter.std() == pytest.approx(0.02 * 0.986, rel=0.08), name  # 3-sigma truncation: 0.986
    again = CausalLM(config)
    initialize(again, seed=6198)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_clipping_does_not_write_into_its_input():
    """transformers clamps in place, which breaks gradient hooks."""
    ours, _ = pair(CASES[1])
    kept = []
    ours.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
    ours(tokens(1, 6), torch.arange(6).unsqueeze(0), causal_attend)
    assert torch.equal(*kept[0])
    assert kept[0][0].abs().max() > 0.5


def test_released_architecture_has_the_published_sizes():
    with torch.device("meta"):
        model = CausalLM(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_919_161_856
    assert model.config.num_active_parameters == 1_282_017_280


def test_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="swiglu.*silu"):
        activation("swiglu")


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_equal_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 101)
    assert torch.allclose(activation(name)(x), ACT2FN[name](x), atol=1e-6)
