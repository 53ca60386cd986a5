"""Router policies on the transformers classes: the runner's results on every path, and no effect afterwards."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from configurations import VOCAB_SIZE, small_config
from conftest import make_model
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.ops import cpu
from olmoe.runner import Batch, CacheView, RouterPolicy, Want, make_runner
from olmoe.runner.policy_file import NamedPolicy, as_policy
from olmoe.weights import checkpoint
from packed_folders import WHOLE, packed_folder, plain_folder

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(0))
POLICIES = [
    {"ban": [{"expert": 0}, {"layer": 1, "expert": 5}]},
    {"pin": [{"layer": 0, "expert": 5}, {"layer": 1, "experts": [0, 7]}]},
    {"boost": [{"experts": [1, 2], "bias": 1.5}], "k": 5, "renormalize": True, "temperature": [0.5, 2.0]},
    {"allow": [{"layer": 1, "experts": [0, 1, 2, 3]}], "k": 1},
]
needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")
by_policy = pytest.mark.parametrize("policy", POLICIES, ids=["ban", "pin", "boost, temperature, k", "allow, fewer"])


def make_face(**changes):
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**(small_config(**changes).to_dict()))).eval()


def relative(ours, theirs):
    assert torch.isfinite(ours).all()
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def runner_logits(network, policy, backend):
    """A runner's logits (B, T, V) for `IDS`."""
    runner, (b, t) = make_runner(network, backend), IDS.shape
    cache = runner.new_cache(b, 64, torch.float32)  # as in the transformers classes
    table = np.arange(b, dtype=np.int32).reshape(b, 1)
    resolved = as_policy(policy).resolve(network.config)
    batch = Batch(IDS.flatten().tolist(), [t] * b, [0] * b, policies=[resolved] * b)
    return runner.forward(batch, CacheView(cache, table), Want(range(b * t))).logits.view(b, t, -1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("policies")
    return {"plain": plain_folder(place / "plain", **WHOLE), "packed": packed_folder(place / "int4", **WHOLE)}


@needs_kernels
@by_policy
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_logits_under_a_policy_equal_those_of_a_runner(folders, kind, policy):
    """In one pass, and with a decoding step through all layers at once; on torch too."""
    network = checkpoint.load(folders[kind], dtype=torch.float32)
    model = OlmoeForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    expected = runner_logits(network, policy, "cpu")
    with torch.no_grad():
        plain = model(IDS).logits
        model.router_policy = policy
        whole = model(IDS).logits
        first = model(IDS[:, :-1], use_cache=True)
        last = model(IDS[:, -1:], past_key_values=first.past_key_values).logits
        assert relative(whole, expected) < 1e-5
        assert relative(last[:, 0], expected[:, -1]) < 1e-5
        assert relative(plain, expected) > 1e-3
        model.set_kernel_backend("torch")
        assert relative(model(IDS).logits, runner_logits(network, policy, "torch")) < 1e-5
        model.set_kernel_backend("auto")
        model.router_policy = None
        assert torch.equal(model(IDS).logits, plain)


@by_policy
def test_policies_compute_the_same_with_gradients_enabled(policy):
    model = make_face()
    model.router_policy = policy
    with torch.no_grad():
        expected = model(IDS).logits
    loss = model(IDS, labels=IDS)
    assert relative(loss.logits, expected) < 1e-5
    loss.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)
    assert gradients["model.layers.0.mlp.gate.weight"].abs().max() > 0
    if "ban" in policy:  # experts that no token chooses get no gradient
        assert gradients["model.layers.0.mlp.experts.down_proj"][0].abs().max() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_policy_of_the_forward_pass(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make_face().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with model.routed_by(POLICIES[2]):
            loss = model(inputs_embeds=embedded, labels=IDS).loss
        loss.backward()  # layers are recomputed here, outside the block
        assert model.router_policy is None
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@needs_kernels
@by_policy
def test_generation_under_a_policy_equals_the_engines(policy, tokenizer):
    network = make_model()
    model = make_face()
    model.load_state_dict(network.state_dict())
    llm = LLM.from_parts(network, tokenizer)
    params = SamplingParams(max_new_tokens=10, ignore_eos=True, router_policy=policy)
    expected = llm.generate(IDS[0].tolist(), params)[0].token_ids
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(IDS[:1], **options)
    for backend in ("auto", "torch"):
        model.set_kernel_backend(backend)
        with model.routed_by(policy):
            found = model.generate(IDS[:1], **options)[0, IDS.shape[1] :].tolist()
        assert found == expected
    assert torch.equal(model.generate(IDS[:1], **options), plain)


def test_a_policy_set_for_inference_also_applies_in_training():
    model = make_face()
    with torch.inference_mode():
        model.router_policy = POLICIES[2]
        model(IDS)
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0


def test_routed_by_applies_inside_the_block_only():
    model = make_face()
    outer, inner = RouterPolicy(top_k=2), {"k": 1}
    assert model.router_policy is None
    with model.routed_by(outer):
        assert model.router_policy is outer
        assert model.model.router_policy is outer  # the decoder's as well
        with model.routed_by(inner):
            assert model.router_policy == NamedPolicy(k=1)
            with model.routed_by(None):
                assert model.router_policy is None
        assert model.router_policy is outer
        with pytest.raises(KeyError), model.routed_by(inner):
            raise KeyError
        assert model.router_policy is outer
    assert model.router_policy is None


def test_returned_router_logits_and_losses_ignore_the_policy():
    model = make_face()
    with torch.no_grad():
        plain = model(IDS, output_router_logits=True, labels=IDS)
        with model.routed_by(POLICIES[2]):
            changed = model(IDS, output_router_logits=True, labels=IDS)
    assert (
        relative(changed.router_logits[0], plain.router_logits[0]) < 1e-6
    )  # of the first layer, whose input is the same
    assert relative(changed.logits, plain.logits) > 1e-3


def test_the_policy_is_not_saved_with_the_model(tmp_path):
    model = make_face()
    model.router_policy = POLICIES[1]
    model.save_pretrained(tmp_path / "model")
    assert "policy" not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.router_policy is None
    assert not any("policy" in name for name in model.state_dict())
    with torch.no_grad():
        expected = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # the same object in memory
            assert torch.equal(other(IDS).logits, expected)
        model.router_policy = None
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_policies_apply_to_other_heads_and_adapters():
    torch.manual_seed(0)
    classifier = OlmoeForSequenceClassification(OlmoeConfig(**small_config().to_dict() | {"pad_token_id": 0})).eval()
    with torch.no_grad():
        plain = classifier(IDS).logits
        with classifier.routed_by(POLICIES[3]):
            assert relative(classifier(IDS).logits, plain) > 1e-3
        assert torch.equal(classifier(IDS).logits, plain)
    peft = pytest.importorskip("peft")
    model = make_face()
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad(), model.routed_by(POLICIES[1]), adapted.routed_by(POLICIES[1]):
        assert relative(adapted(IDS).logits, model(IDS).logits) < 1e-5


def test_hooks_see_the_choice_of_the_policy():
    model, seen = make_face(), []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad(), model.routed_by(POLICIES[1]):
        model(IDS)
    _, weights, ids = seen[0]
    assert ids.shape == weights.shape == (IDS.numel(), 3)
    assert (ids == 5).any(dim=1).all()


def test_policies_apply_in_compiled_models():
    torch._dynamo.reset()  # other tests' compilations count towards its limit
    model = make_face()
    with torch.no_grad(), model.routed_by(POLICIES[2]):
        expected = model(IDS).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative(compiled(IDS, use_cache=False).logits, expected) < 1e-5
    with torch.no_grad():
        assert relative(compiled(IDS, use_cache=False).logits, model(IDS).logits) < 1e-5


def test_invalid_policies_are_refused():
    model = make_face()
    with pytest.raises(UserError, match="router_policy must be a RouterPolicy, a file or a mapping, not 3"):
        model.router_policy = 3
    with pytest.raises(UserError, match="the expert 99, but the model's are 0 to 7"):
        model.router_policy = {"ban": [{"expert": 99}]}
    with pytest.raises(UserError, match="shape"), model.routed_by(RouterPolicy(pinned=np.zeros((1, 8)))):
        raise AssertionError
    assert model.router_policy is None
