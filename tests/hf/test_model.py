"""Our transformers classes against transformers' own OLMoE classes on shared random weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from configurations import CASES, VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification, OlmoeModel


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12))


def pair(case, attention="eager"):
    settings = small_config(**case.changes).to_dict()
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**settings, attn_implementation=attention))
    theirs.set_experts_implementation("eager")
    ours = OlmoeForCausalLM(OlmoeConfig(**settings, attn_implementation=attention))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def batch(length, padded=False):
    ids = torch.randint(2, VOCAB_SIZE - 1, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded and length > 5:
        mask[1, :5] = 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_output_equals_transformers(case, padded):
    ours, theirs = pair(case)
    ids, mask = batch(case.tokens, padded)
    asked = {
        "attention_mask": mask, "labels": ids, "output_router_logits": True, "output_hidden_states": True,
        "output_attentions": True, "use_cache": True,
    }  # fmt: skip
    expected, output = theirs(ids, **asked), ours(ids, **asked)
    assert list(output.keys()) == list(expected.keys())
    rows = mask.bool()
    for name in ("loss", "aux_loss"):
        if case.tokens > 1:
            assert float(output[name]) == pytest.approx(float(expected[name]), rel=1e-5)
    assert relative(output.logits[rows], expected.logits[rows]) < 1e-5
    for name in ("router_logits", "hidden_states", "attentions"):
        assert len(output[name]) == len(expected[name])
        for a, b in zip(output[name], expected[name], strict=True):
            kept = rows if name == "hidden_states" else rows.flatten() if name == "router_logits" else slice(None)
            if name == "attentions" and padded:
                continue  # rows of padding queries are arbitrary
            assert relative(a[kept], b[kept]) < 1e-5
    for a, b in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert a.keys.shape == b.keys.shape


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate_equals_transformers(case, settings):
    ours, theirs = pair(case, "sdpa")
    ids, mask = batch(9, padded=True)
    common = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None} | settings
    assert torch.equal(ours.generate(ids, **common), theirs.generate(ids, **common))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(attention):
    ours, _ = pair(CASES[3])
    ids, mask = batch(16, padded=True)
    with torch.no_grad():  # flex attention has no backward on a CPU
        expected = ours(ids, attention_mask=mask).logits[mask.bool()]
        ours.set_attn_implementation(attention)
        assert relative(ours(ids, attention_mask=mask).logits[mask.bool()], expected) < 1e-5


def test_checkpoints_round_trip_through_transformers_bit_for_bit(tmp_path):
    ours, theirs = pair(CASES[0])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        for loader in (OlmoeForCausalLM, transformers.OlmoeForCausalLM):
            loaded, report = loader.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not report["missing_keys"]
            assert not report["unexpected_keys"]
            for name, value in theirs.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], value), name
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    files = [{p.name: p.read_bytes() for p in (tmp_path / f).glob("*.safetensors")} for f in ("ours", "theirs")]
    assert files[0] == files[1]


def test_gradient_checkpointing_changes_nothing():
    ours, _ = pair(CASES[0])
    ids, _ = batch(12)
    gradients = []
    for checkpointing in (False, True):
        ours.train().zero_grad()
        if checkpointing:
            ours.gradient_checkpointing_enable()
        output = ours(ids, labels=ids, output_router_logits=True)
        output.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in ours.named_parameters()})
    for name, value in gradients[0].items():
        assert relative(gradients[1][name], value) < 1e-5, name


def test_logits_to_keep_accepts_a_number_and_positions():
    ours, _ = pair(CASES[0])
    ids, _ = batch(8)
    whole = ours(ids).logits
    assert torch.allclose(ours(ids, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5)
    assert torch.allclose(ours(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]], atol=1e-5)


def test_return_dict_false_gives_tuples():
    ours, theirs = pair(CASES[0])
    ids, _ = batch(6)
    ours_tuple, theirs_tuple = ours(ids, return_dict=False), theirs(ids, return_dict=False)
    assert len(ours_tuple) == len(theirs_tuple)
    assert relative(ours_tuple[0], theirs_tuple[0]) < 1e-5


def test_base_model_and_classifier_equal_transformers():
    config = OlmoeConfig(**small_config().to_dict(), num_labels=3)
    ids, mask = batch(7)
    assert OlmoeModel(config)(ids).last_hidden_state.shape == (2, 7, config.hidden_size)
    classifier = OlmoeForSequenceClassification(config).eval()
    output = classifier(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    assert classifier.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_routers_stay_fp32_under_autocast(dtype, attention, training):
    """Logits have autocast's dtype, as in transformers, for a long prompt and a short one, which the kernels run."""
    ours, theirs = pair(CASES[0], attention)
    for length in (2, 24):
        ids, _ = batch(length)
        exact = theirs(ids, labels=ids, output_router_logits=True)
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(training):
            output = ours(ids, labels=ids, output_router_logits=True)
        assert {t.dtype for t in output.router_logits} == {torch.float32}
        assert output.logits.dtype == dtype
        assert output.loss.dtype == output.aux_loss.dtype == torch.float32
        assert relative(output.router_logits[0], exact.router_logits[0]) < 0.02
        assert float(output.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=5e-3)


def test_router_logits_of_the_first_layer_are_not_rounded_by_autocast():
    """Attention has the only products before them, so without it they are exact."""
    ours, _ = pair(CASES[0])
    ours.model.layers[0].self_attn.o_proj.weight.data.zero_()
    ids, _ = batch(9)
    exact = ours(ids, output_router_logits=True).router_logits[0]
    with torch.autocast("cpu"):
        assert torch.equal(ours(ids, output_router_logits=True).router_logits[0], exact)
