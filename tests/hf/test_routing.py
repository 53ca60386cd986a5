"""Routing recorded from our transformers classes is what the routers chose for each token, whatever runs them."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification
from olmoe.hf import record_routing
from olmoe.hf.recording import asked
from olmoe.runner import Trace
from sentences import refused

IDS = torch.randint(2, VOCAB_SIZE - 1, (3, 12), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**small_config(num_key_value_heads=2).to_dict())).eval()


def chosen_by(model, ids) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and probabilities (T, L, K) from the router logits of a text by itself."""
    with torch.no_grad():
        logits = model(torch.as_tensor(ids).view(1, -1), output_router_logits=True, use_cache=False).router_logits
    top = torch.stack(logits, dim=1).softmax(dim=-1).topk(model.config.num_experts_per_tok, dim=-1)
    return top.indices.numpy(), top.values.numpy()


def assert_texts(model, trace: Trace, texts) -> None:
    """The windows of a trace are these texts, with the choices of their tokens."""
    windows = list(trace.windows())
    assert [trace.input_ids[window].tolist() for window in windows] == [list(map(int, text)) for text in texts]
    for window in windows:
        experts, weights = chosen_by(model, trace.input_ids[window].astype(np.int64))
        np.testing.assert_array_equal(trace.expert_ids[window], experts)
        np.testing.assert_allclose(trace.weights[window], weights, atol=2e-3)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_forward_pass_is_recorded(model, tmp_path, gradients):
    with torch.set_grad_enabled(gradients), record_routing(model, tmp_path / "t", metadata={"model": "m"}) as recording:
        plain = model(IDS)
    assert recording.tokens == IDS.numel()
    assert_texts(model, Trace.open(tmp_path / "t"), IDS.tolist())
    assert recording.trace.metadata["model"] == "m"
    assert plain.router_logits is None
    torch.testing.assert_close(plain.logits, model(IDS).logits)


def test_padding_is_not_recorded(model):
    mask = torch.ones_like(IDS)
    mask[0, :5], mask[1, 9:], mask[2, :12] = 0, 0, 0
    for given in (mask, mask.bool()):
        with record_routing(model) as recording, torch.no_grad():
            model(IDS, attention_mask=given)
        assert_texts(model, recording.trace, [IDS[0, 5:].tolist(), IDS[1, :9].tolist()])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_generation_is_recorded(model, backend):
    model.set_kernel_backend(backend)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with record_routing(model) as recording:
        texts = model.generate(IDS, attention_mask=mask, **GREEDY)
    assert_texts(model, recording.trace, [texts[0, 5:-1], texts[1, :-1], texts[2, :-1]])


def test_generation_with_a_static_cache_is_recorded(model):
    with record_routing(model) as recording:
        texts = model.generate(IDS, cache_implementation="static", **GREEDY)
    assert_texts(model, recording.trace, texts[:, :-1])


def test_generation_in_another_thread_and_repeated_is_recorded(model):
    found = []

    def generate():
        found.append(model.generate(IDS[:1], **GREEDY))

    with record_routing(model) as recording:
        for _ in range(2):
            thread = threading.Thread(target=generate)
            thread.start()
            thread.join()
    assert_texts(model, recording.trace, [text[0, :-1] for text in found])


def test_recordings_may_be_nested(model):
    with record_routing(model) as outer:
        model(IDS[:1])
        with record_routing(model) as inner:
            model(IDS[1:2])
        model(IDS[2:])
    assert_texts(model, inner.trace, IDS[1:2].tolist())
    assert_texts(model, outer.trace, IDS.tolist())


def test_recordings_may_overlap(model):
    first, second = record_routing(model), record_routing(model)
    one, two = first.__enter__(), second.__enter__()
    model(IDS[:1])
    first.__exit__(None, None, None)
    model(IDS[1:2])
    second.__exit__(None, None, None)
    assert_texts(model, one.trace, IDS[:1].tolist())
    assert_texts(model, two.trace, IDS[:2].tolist())
    assert asked() is None


def test_threads_running_the_model_concurrently_are_recorded(model):
    texts = [IDS[0, :4], IDS[1, :9], IDS[2, 3:]]
    meet = threading.Barrier(len(texts))
    failed = []

    def run(text):
        meet.wait()
        try:
            for _ in range(6):
                model.generate(text.view(1, -1), **GREEDY)
        except Exception as error:  # raised in the test, not in the thread
            failed.append(error)

    threads = [threading.Thread(target=run, args=(text,)) for text in texts]
    with record_routing(model) as recording:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    whole = [model.generate(text.view(1, -1), **GREEDY)[0, :-1].tolist() for text in texts]
    trace = recording.trace
    found = [trace.input_ids[window].tolist() for window in trace.windows()]
    assert sorted(found) == sorted(whole * 6)
    assert_texts(model, trace, found)


def test_texts_continue_with_their_own_cache_only(model):
    cache, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with record_routing(model) as recording, torch.no_grad():
        for start, end in pairwise((0, 3, 4, 12)):
            model(IDS[:, start:end], past_key_values=cache)
        model(IDS[:, :2], past_key_values=other)
        model(IDS[:1, :4])
    assert_texts(model, recording.trace, [*IDS.tolist(), *IDS[:, :2].tolist(), IDS[0, :4].tolist()])


def test_packed_texts_are_recorded_separately(model):
    positions = torch.tensor([[*range(5), *range(7)]])
    with record_routing(model) as recording, torch.no_grad():
        model(IDS[:1], position_ids=positions, use_cache=False)
    assert_texts(model, recording.trace, [IDS[0, :5], IDS[0, 5:]])


def test_input_embeddings_are_recorded_without_ids(model):
    with record_routing(model) as recording, torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert set(recording.trace.input_ids.tolist()) == {-1}
    np.testing.assert_array_equal(recording.trace.expert_ids[:12], chosen_by(model, IDS[0])[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_is_recorded(model, reentrant):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with record_routing(model) as recording:
        out = model(IDS, labels=IDS, output_router_logits=True)
        out.loss.backward()
    assert len(out.router_logits) == model.config.num_hidden_layers
    assert all(p.grad is not None for p in model.parameters())
    assert_texts(model.eval(), recording.trace, IDS.tolist())


def test_other_heads_and_wrapped_models_are_recorded(model):
    peft = pytest.importorskip("peft")
    classifier = OlmoeForSequenceClassification(OlmoeConfig(**small_config(pad_token_id=1).to_dict())).eval()
    with record_routing(classifier) as recording, torch.no_grad():
        classifier(IDS)
    assert recording.tokens == IDS.numel()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with record_routing(adapted) as recording:
        texts = adapted.generate(input_ids=IDS, **GREEDY)
    assert_texts(model, recording.trace, texts[:, :-1])
    assert "holds no OlmoeModel" in refused(lambda: record_routing(torch.nn.Linear(2, 2)).__enter__())


def test_layers_with_hooks_or_other_numbers_of_experts_are_recorded(model):
    model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, out: (out[0], out[1], out[2].flip(-1)))
    model.model.layers[1].mlp.gate.top_k = 4
    with record_routing(model) as recording, torch.no_grad():
        model(IDS)
    trace = recording.trace
    assert trace.expert_ids.shape == (IDS.numel(), model.config.num_hidden_layers, 4)
    assert set(trace.expert_ids[:, 0, 3].tolist()) == {255}
    np.testing.assert_array_equal(trace.expert_ids[:12, 0, :3], chosen_by(model, IDS[0])[0][:, 0, ::-1])


def test_errors_leave_no_recording_behind(model, tmp_path):
    def fail():
        with record_routing(model, tmp_path / "t"):
            model(IDS)
            with pytest.raises(ValueError, match="exactly one"):
                model()  # a failed pass is not in the trace
            model(IDS[:1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    model.model.layers[1].mlp = torch.nn.Identity()

    def blind():
        with record_routing(model):
            model(IDS)

    assert "Only 1 of 2 layers" in refused(blind)


def test_recording_a_compiled_model_is_refused(model):
    torch._dynamo.reset()  # beyond its limit it would run uncompiled
    compiled = torch.compile(model, backend="eager")

    def run():
        with record_routing(model), torch.no_grad():
            compiled(IDS)

    assert "Only 0 of 2 layers" in refused(run)
    torch._dynamo.reset()
