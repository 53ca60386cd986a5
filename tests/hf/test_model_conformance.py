"""What transformers promises for every model and ours once broke or might: compiling, checkpointing, caches.

The broad suite that transformers runs on its own classes was run on ours by hand; this is a compact extract.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from transformers.integrations.moe import ExpertsInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 10), generator=torch.Generator().manual_seed(1))


def ours(attention="eager", dtype=torch.float32, **changes):
    """Our model, with the same weights every time."""
    torch.manual_seed(0)
    config = OlmoeConfig(**small_config(**changes).to_dict(), attn_implementation=attention)
    return OlmoeForCausalLM(config).to(dtype).eval()


def pair(attention="eager", dtype=torch.float32):
    """Our model and transformers' own with the same weights."""
    mine = ours(attention, dtype)
    config = transformers.OlmoeConfig(**small_config().to_dict(), attn_implementation=attention)
    theirs = transformers.OlmoeForCausalLM(config).to(dtype).eval()
    theirs.set_experts_implementation("eager")
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@pytest.fixture
def model():
    return ours()


def gradients(model, **options):
    model.train().zero_grad()
    model(IDS, labels=IDS, output_router_logits=True, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_whole_forward_compiles():
    model = ours("sdpa", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_compiled_training_step_has_the_same_gradients():
    model = ours("sdpa", num_hidden_layers=1, intermediate_size=18)  # 18 fp32 are no multiple of 16 bytes
    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(IDS, labels=IDS, output_router_logits=True, use_cache=False).loss.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected)


def test_half_precision_compiles():
    model = ours("sdpa", torch.bfloat16, num_hidden_layers=1)
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits
        torch.testing.assert_close(actual, model(IDS).logits, rtol=0.05, atol=0.1)


def test_the_forward_exports():
    model = ours("sdpa", num_hidden_layers=1)
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), kwargs={"use_cache": False}, strict=False)
        actual = program.module()(IDS, use_cache=False).logits
        torch.testing.assert_close(actual, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing_is_per_layer_and_keeps_router_gradients(model, reentrant):
    expected = gradients(model)
    calls = []
    for layer in model.model.layers:
        assert isinstance(layer, GradientCheckpointingLayer)
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.enable_input_require_grads()  # as reentrant checkpointing requires
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_gradients(gradients(model), expected)
    assert len(calls) == 2 * len(model.model.layers)  # once in forward, once more in backward
    # Without gradients nothing is recomputed, so a model in training mode generates with its cache.
    sampled = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    model.gradient_checkpointing_disable()
    assert torch.equal(sampled, model.eval().generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None))


def test_no_cache_is_created_while_checkpointing(model):
    model.train().gradient_checkpointing_enable()
    cache = transformers.DynamicCache(config=model.config)
    output = model(IDS, labels=IDS, past_key_values=cache, use_cache=True)
    output.loss.backward()
    assert output.past_key_values is None
    assert cache.get_seq_length() == 0


@pytest.fixture
def interface_calls(monkeypatch):
    """Calls of functions in transformers' experts interface."""
    calls = []
    for name, original in list(ExpertsInterface._global_mapping.items()):

        def counted(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setitem(ExpertsInterface._global_mapping, name, counted)
    return calls


@pytest.mark.parametrize("set_by", ["method", "configuration"])
@pytest.mark.parametrize("name", ["batched_mm", "grouped_mm"])
def test_experts_implementations_switch_at_run_time(model, name, set_by, interface_calls):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(IDS).logits
        for implementation in ("eager", name, "olmoe"):
            if set_by == "method":
                model.set_experts_implementation(implementation)
            else:
                model.config._experts_implementation = implementation
            assert model.config._experts_implementation == implementation
            for each in (model, copy.deepcopy(model)):
                interface_calls.clear()
                torch.testing.assert_close(each(IDS).logits, expected, rtol=1e-5, atol=1e-5)
                assert interface_calls == ([name] * 2 if implementation == name else [])
    with pytest.raises(ValueError, match="fastest"):
        model.set_experts_implementation("fastest")


def test_experts_implementation_on_loading(model, tmp_path, interface_calls):
    model.save_pretrained(tmp_path)
    assert model.config._experts_implementation == "eager"
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    interface_calls.clear()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert interface_calls == ["batched_mm"] * 2


@pytest.mark.parametrize("chosen", [0, -1, [0, -1]], ids=str)
def test_selected_hidden_states_are_returned(model, chosen):
    whole = model(IDS, output_hidden_states=True).hidden_states
    some = model(IDS, output_hidden_states=chosen).hidden_states
    kept = {i % len(whole) for i in (chosen if isinstance(chosen, list) else [chosen])}
    assert [i for i, state in enumerate(some) if state is not None] == sorted(kept)
    assert all(torch.equal(some[i], whole[i]) for i in kept)


def test_attentions_of_an_implementation_without_them_are_an_empty_tuple():
    mine, theirs = pair("sdpa")
    assert mine(IDS, output_attentions=True).attentions == theirs(IDS, output_attentions=True).attentions == ()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_texts_equal_transformers(attention):
    model = ours(attention)
    packed = torch.cat([IDS[:1, :4], IDS[1:, :6]], dim=1)
    positions = torch.tensor([[*range(4), *range(6)]])
    with torch.no_grad():
        actual = model(packed, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(IDS[:1, :4]).logits, model(IDS[1:, :6]).logits], dim=1)
    torch.testing.assert_close(actual, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "top_k": 5},
    ],
    ids=str,
)
def test_every_generation_mode_equals_transformers(options):
    mine, theirs = pair("sdpa")
    rows = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True} | options
    outputs = []
    for each in (mine, theirs):
        torch.manual_seed(3)
        outputs.append(each.generate(rows, **common))
    assert torch.equal(*outputs)


def test_assisted_generation_and_embedded_prompts(model):
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS[:1], **common)
    assistant = ours(num_hidden_layers=1)
    assert torch.equal(model.generate(IDS[:1], assistant_model=assistant, **common), expected)
    embedded = model.get_input_embeddings()(IDS[:1])
    assert torch.equal(model.generate(inputs_embeds=embedded, **common), expected[:, IDS.shape[1] :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_within_rounding(dtype):
    mine, theirs = pair("eager", dtype)
    exact = ours()
    exact.load_state_dict(mine.state_dict())  # the same rounded weights
    with torch.no_grad():
        actual, expected, truth = (m(IDS, output_router_logits=True) for m in (mine, theirs, exact))
    assert actual.logits.dtype == dtype
    outputs = zip(*((o.logits, *o.router_logits) for o in (actual, expected, truth)), strict=True)
    for a, b, c in outputs:
        error, allowed = ((x.float() - c).norm() / c.norm() for x in (a, b))
        assert error <= 2 * allowed + 1e-4  # router logits stay in fp32 here
    assert float(actual.aux_loss) == pytest.approx(float(truth.aux_loss), rel=0.02)


def test_the_loss_is_normalised_by_the_number_of_items_of_the_whole_batch():
    mine, theirs = pair()
    options = {"labels": IDS, "num_items_in_batch": torch.tensor(40)}
    assert float(mine(IDS, **options).loss) == pytest.approx(float(theirs(IDS, **options).loss), rel=1e-5)
    assert float(mine(IDS, **options).loss) != pytest.approx(float(mine(IDS, labels=IDS).loss), rel=1e-2)


def test_tied_weights_survive_loading_resizing_and_copies(tmp_path):
    model = ours(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    for each in (OlmoeForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(each(IDS).logits, model(IDS).logits)
        each.resize_token_embeddings(VOCAB_SIZE + 8)
        assert each.lm_head.weight is each.model.embed_tokens.weight
        assert each(IDS).logits.shape[-1] == each.config.vocab_size == VOCAB_SIZE + 8
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()


def test_a_head_that_the_checkpoint_lacks_is_initialised(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = OlmoeForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight"}
    assert loaded.score.weight.isfinite().all()
    assert 0 < loaded.score.weight.abs().max() <= 3 * loaded.config.initializer_range
    for name, buffer in model.model.named_buffers():
        assert torch.equal(loaded.model.get_buffer(name), buffer), name


def test_layers_offloaded_to_disk_compute_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    loaded = OlmoeForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.model.layers[0].mlp.experts.down_proj.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
