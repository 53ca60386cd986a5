"""Hooks inside the model, as interpretability tools set them, behave like hooks on transformers' own class.

Two models with the same weights, one of transformers' own class, get the same hooks and are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from configurations import VOCAB_SIZE
from olmoe.hf import attention
from olmoe.hf.model import OlmoeDecoderLayer
from peers import IDS, assert_alike, decoded, difference, peers
from quantized_models import QuantizedModels

# Every callable module of a layer, and those around the layers.
LAYER = (
    "", ".input_layernorm", ".self_attn", ".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj",
    ".self_attn.o_proj", ".self_attn.q_norm", ".self_attn.k_norm", ".post_attention_layernorm", ".mlp", ".mlp.gate",
    ".mlp.experts",
)  # fmt: skip
AROUND = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
PLACES = (*AROUND, *(f"model.layers.1{name}" for name in LAYER))
EVERY = (*AROUND, *(f"model.layers.{layer}{name}" for layer in (0, 1) for name in LAYER))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def tensors(value):
    """The tensors among arguments, results or gradients, with None for missing ones; caches and flags are skipped."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, Mapping):
        return [t for _, each in sorted(value.items()) for t in tensors(each) if t is not None]
    if isinstance(value, tuple):
        return [t for each in value for t in ([None] if each is None else tensors(each))]
    return []


def watch(model, places, backward=False):
    """Register every kind of hook on some modules; returns the recorded events and the handles."""
    events, handles = [], []

    def note(kind, name, *values):
        events.append((kind, name, [type(value).__name__ for value in values], tensors(values)))

    for name in places:
        module = model.get_submodule(name)

        def before(module, args, kwargs, name=name):
            note("before", name, args, kwargs)

        def after(module, args, kwargs, output, name=name):
            note("after", name, args, kwargs, output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
        if backward:
            handles.append(
                module.register_full_backward_pre_hook(lambda _, outer, name=name: note("backward", name, outer))
            )
            handles.append(
                module.register_full_backward_hook(
                    lambda _, inner, outer, name=name: note("gradients", name, inner, outer)
                )
            )
    return events, lambda: [handle.remove() for handle in handles]


def assert_same_events(ours, theirs, tolerance=2e-5):
    assert [event[:3] for event in ours] == [event[:3] for event in theirs]
    for (kind, name, _, found), (*_, expected) in zip(ours, theirs, strict=True):
        assert len(found) == len(expected), (kind, name)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None), (kind, name)
            if a is not None:
                assert a.dtype == b.dtype, (kind, name)
                assert difference(a.float(), b.float()) < tolerance, (kind, name)


@pytest.fixture
def layers_by_kernels(monkeypatch):
    """How many layers the kernels ran, alone or in one call for a whole step."""
    taken: list[int] = []
    alone, together = OlmoeDecoderLayer._fitting, attention.all_layers

    def one(layer, *arguments):
        kernel = alone(layer, *arguments)
        taken.append(int(kernel is not None))
        return kernel

    def several(layers, *arguments):
        done = together(layers, *arguments)
        taken.append(0 if done is None else len(layers))
        return done

    monkeypatch.setattr(OlmoeDecoderLayer, "_fitting", one)
    monkeypatch.setattr(attention, "all_layers", several)
    return lambda: (sum(taken), taken.clear())[0]


# ---- what hooks see ----


def of_a_prompt(model):
    with torch.no_grad():
        model(IDS)


def of_padded_texts(model):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    model.generate(IDS, attention_mask=mask, **GREEDY)


def of_beams(model):
    model.generate(IDS, num_beams=3, max_new_tokens=4, do_sample=False, eos_token_id=None)


def of_generation(model):
    model.generate(IDS, **GREEDY)


@pytest.mark.parametrize("run", [of_a_prompt, of_generation, of_padded_texts, of_beams])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "norm_topk_prob": True, "clip_qkv": 0.5}])
def test_hooks_on_every_module_see_the_same_values_as_transformers(run, changes):
    seen = []
    for model in peers(**changes):
        events, _ = watch(model, EVERY)
        run(model)
        seen.append(events)
    assert len(seen[0]) >= 2 * len(EVERY)
    assert_same_events(*seen)


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_added_after_generation_is_called_until_removed(place, layers_by_kernels):
    ours, theirs = peers()
    plain = ours.generate(IDS, **GREEDY)
    undisturbed = layers_by_kernels()
    assert undisturbed == 2 * GREEDY["max_new_tokens"]  # only the kernels until now
    seen = []
    for model in (ours, theirs):
        events, remove = watch(model, [place])
        assert torch.equal(model.generate(IDS, **GREEDY), plain)
        remove()
        seen.append(events)
    assert len(seen[0]) == 2 * GREEDY["max_new_tokens"]
    assert_same_events(*seen)
    # Hooks around a layer do not look inside it; other layers stay with the kernels, and all do once hooks are removed.
    assert layers_by_kernels() == (undisturbed if place in (*AROUND, "model.layers.1") else undisturbed // 2)
    assert torch.equal(ours.generate(IDS, **GREEDY), plain)
    assert layers_by_kernels() == undisturbed


def test_activations_are_called_with_the_same_inputs_as_transformers():
    """Once for all experts, with rows sorted by expert, as in transformers' default implementation."""
    ours, theirs = peers()
    theirs.set_experts_implementation("grouped_mm")
    seen = []
    for model in (ours, theirs):
        events, _ = watch(model, ["model.layers.1.mlp.experts.act_fn"])
        of_generation(model)
        # theirs leave the order of one expert's rows unspecified
        seen.append([(*event[:3], [t[t[:, 0].argsort()] for t in event[3]]) for event in events])
    assert seen[0][0][3][0].shape == (IDS.numel() * 3, 12)
    assert_same_events(*seen)


def test_in_half_precision_only_the_router_differs_in_dtype():
    seen = []
    for model in peers():
        events, _ = watch(model.bfloat16(), EVERY)
        of_a_prompt(model)
        seen.append([(*event[:3], [t.dtype for t in event[3] if t is not None]) for event in events])
    differ = {a[1].rpartition("layers.")[2][2:] for a, b in zip(*seen, strict=True) if a != b}
    # Its logits and weights are fp32 (docs/huggingface.md), and so are angles; modules that take them get fp32.
    assert differ == {"", "self_attn", "mlp.gate", "mlp.experts", "del.rotary_emb"}
    assert [event[:2] for event in seen[0]] == [event[:2] for event in seen[1]]


# ---- what hooks change ----


def smeared(value):
    """A tensor minus half of its neighbouring values, or a tuple of such, which no norm or softmax undoes."""
    if isinstance(value, tuple):
        return tuple(smeared(each) for each in value)
    return value - 0.5 * value.roll(1, -1) if isinstance(value, Tensor) and value.is_floating_point() else value


def smear_in_place(value):
    for tensor in value if isinstance(value, tuple) else (value,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.copy_(smeared(tensor))


def returned(module):
    module.register_forward_hook(lambda _, args, output: smeared(output))


def in_place(module):
    module.register_forward_hook(lambda _, args, output: smear_in_place(output))


def given(module):
    def hook(module, args, kwargs):
        return smeared(args), {name: smeared(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def given_in_place(module):
    def hook(module, args, kwargs):
        smear_in_place(args)
        smear_in_place(kwargs.get("hidden_states"))

    module.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", [returned, in_place, given, given_in_place])
def test_changes_made_by_hooks_take_effect(place, change):
    if place in ("model.embed_tokens", "model.rotary_emb") and change in (given, given_in_place):
        pytest.skip("ids cannot be smeared, and of hidden states only the device is used there")
    ours, theirs = peers()
    undisturbed = decoded(ours)
    for model in (ours, theirs):
        change(model.get_submodule(place))
    with torch.no_grad():
        assert_alike(ours, theirs)
    assert difference(decoded(ours), undisturbed) > 1e-4


# ---- gradients ----

# On modules whose positional inputs have no gradient.
FIRING = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@FIRING
def test_backward_hooks_on_every_module_get_the_same_gradients_as_transformers():
    seen = []
    for model in peers():
        events, _ = watch(model, EVERY, backward=True)
        model(IDS, labels=IDS).loss.backward()
        seen.append(events)
    assert {kind for kind, *_ in seen[0]} == {"before", "after", "backward", "gradients"}
    assert_same_events(*seen, tolerance=1e-4)


@FIRING
@pytest.mark.parametrize("place", [place for place in PLACES if "rotary" not in place])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_gradients_returned_by_hooks_propagate(place, kind):
    pair, plain = peers(), []
    for model in pair:
        model(IDS, labels=IDS).loss.backward()
        plain.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        getattr(model.get_submodule(place), kind)(
            lambda _, first, *rest: tuple(None if g is None else 3 * g for g in first)
        )
        model(IDS, labels=IDS).loss.backward()
    for (name, a), b in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert difference(a.grad, b.grad) < 1e-4, name
    changed = [difference(p.grad, before) > 1e-2 for p, before in zip(pair[0].parameters(), plain[0], strict=True)]
    # Ids have no gradient to pass on, and hooks cannot change gradients of keyword arguments.
    assert any(changed) == (not place.endswith(("embed_tokens", "self_attn")) or "pre" in kind)


def test_a_routers_backward_hook_also_gets_the_gradient_of_the_auxiliary_loss():
    model = peers()[0]
    kept, given = [], []
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda _, args, output: kept.append(output[0]))
    gate.register_full_backward_pre_hook(lambda _, outer: given.append(outer[0]))
    aux_loss = model(IDS, output_router_logits=True).aux_loss
    (expected,) = torch.autograd.grad(aux_loss, kept, retain_graph=True)
    aux_loss.backward()
    assert difference(given[-1], expected) < 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_attribution_reads_gradients_of_activations_kept_by_hooks(place):
    """With frozen parameters, as attribution does: gradients start at the embeddings."""
    if place in ("model.rotary_emb",):
        pytest.skip("angles have no gradients")
    gradients = []
    for model in peers():
        model.requires_grad_(False)
        kept = []

        def keep(module, args, output, kept=kept):
            first = [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
            kept.extend(t for t in first if t.is_floating_point())
            for tensor in kept:
                tensor.retain_grad()

        model.model.embed_tokens.register_forward_hook(lambda _, args, output: output.requires_grad_())
        model.get_submodule(place).register_forward_hook(keep)
        model(IDS).logits[:, -1].log_softmax(-1)[:, 7].sum().backward()
        gradients.append([t.grad for t in kept])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert difference(a, b) < 1e-4
    assert any(b is not None and b.abs().max() > 1e-6 for b in gradients[0])


# ---- patched routers ----


def chosen_from(logits, k):
    """A router's outputs for these logits, as a patch that recomputes them returns them."""
    weights, ids = logits.float().softmax(-1).topk(k, dim=-1)
    return logits, weights.to(logits.dtype), ids


def without_the_first(module, args, output):
    """Knock out the experts that most tokens rank first."""
    logits, _, ids = output
    return chosen_from(logits.index_fill(1, ids[:, 0].unique()[:2], -torch.inf), ids.shape[1])


def forced(module, args, output):
    """Send every token to expert 5 first."""
    bias = torch.zeros(output[0].shape[1], dtype=output[0].dtype)
    bias[5] = 1e4
    logits, _, ids = chosen_from(output[0] + bias, output[2].shape[1])
    return logits, torch.full_like(output[1], 0.25), ids


def fewer(module, args, output):
    """One expert per token."""
    return output[0], output[1][:, :1], output[2][:, :1]


def more(module, args, output):
    """All experts."""
    return chosen_from(output[0], output[0].shape[1])


def twice_the_same(module, args, output):
    return output[0], output[1], output[2][:, :1].expand_as(output[2])


def ids_in_place(module, args, output):
    output[2].copy_((output[2] + 1) % output[0].shape[1])


def weights_in_place(module, args, output):
    output[1][:, 0] = 0


def of_other_tokens(module, args, output):
    return type(output)([output[0], output[1].flip(0), output[2].flip(0)])


def only_the_last_token(module, args, output):
    weights, ids = output[1].clone(), output[2].clone()
    weights[-1], ids[-1] = 1 / ids.shape[1], torch.arange(ids.shape[1])
    return output[0], weights, ids


def none_second(module, args, output):
    """The id behind the last expert stands for none."""
    ids = output[2].clone()
    ids[::2, 1] = output[0].shape[1]
    return output[0], output[1], ids


PATCHES = [
    without_the_first, forced, fewer, more, twice_the_same, ids_in_place, weights_in_place, of_other_tokens,
    only_the_last_token, none_second,
]  # fmt: skip


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patched_routers_decide_on_every_path(patch, layers_by_kernels):
    ours, theirs = peers()
    plain = decoded(ours)
    assert layers_by_kernels() == 10
    for model in (ours, theirs):
        model.model.layers[1].mlp.gate.register_forward_hook(patch)
    with torch.no_grad():
        assert_alike(ours, theirs)
    assert difference(decoded(ours), plain) > 1e-3
    assert torch.equal(ours.generate(IDS, **GREEDY), theirs.generate(IDS, **GREEDY))
    a, b = (model(IDS, output_router_logits=True).router_logits for model in (ours, theirs))
    for found, expected in zip(a, b, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_router_of_half_precision_may_be_patched_with_weights_of_either_dtype():
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        ours, theirs = (model.bfloat16() for model in peers())
        for model in (ours, theirs):
            model.model.layers[1].mlp.gate.register_forward_hook(
                lambda _, args, output, dtype=dtype: (
                    output[0],
                    torch.full_like(output[1], 0.25, dtype=dtype),
                    output[2],
                )
            )
        a, b = decoded(ours), decoded(theirs)
        assert difference(a.float(), b.float()) < 0.05
        outputs.append(a)
    assert torch.equal(*outputs)  # 0.25 is exact in both dtypes


@pytest.mark.parametrize("wrong", [-1, 9])
@pytest.mark.parametrize("gradients", [False, True])
def test_expert_ids_out_of_range_are_refused(wrong, gradients):
    model = peers()[0]
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _, args, output: (*output[:2], output[2] * 0 + wrong))
    with torch.set_grad_enabled(gradients), pytest.raises(IndexError, match=f"{wrong} to {wrong} are not all below 8"):
        model(IDS)


def test_activations_of_another_run_can_be_patched_in():
    """Activation patching: a clean run's output of one module at one position replaces that of a corrupted run."""
    corrupted = torch.where(torch.arange(IDS.shape[1]) == 3, (IDS + 5) % (VOCAB_SIZE - 2), IDS)
    for place in ("model.layers.0", "model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.0.mlp.experts"):
        results = []
        for model in peers():
            clean, module = {}, model.get_submodule(place)

            def first(output):
                return output[0] if isinstance(output, tuple) else output

            def keep(module, args, output, clean=clean):
                clean["output"] = first(output).clone()

            def patch(module, args, output, clean=clean):
                rows = first(output).view(*IDS.shape, -1).clone()
                rows[:, 3] = clean["output"].view(*IDS.shape, -1)[:, 3]
                rows = rows.view(first(output).shape)
                return (rows, *output[1:]) if isinstance(output, tuple) else rows

            with torch.no_grad():
                handle = module.register_forward_hook(keep)
                model(IDS)
                handle.remove()
                plain = model(corrupted).logits
                module.register_forward_hook(patch)
                results.append(model(corrupted).logits)
            assert difference(results[-1], plain) > 1e-3, place
        assert difference(*results) < 2e-5, place


# ---- packed weights ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return QuantizedModels(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("format", ["q4_0", "nf4"])
def test_packed_models_call_the_same_hooks(models, format):
    packed, plain = models.load(format), models.load(format, dequantize=True)
    for patch in (None, fewer):
        seen = []
        for model in (packed, plain):
            if patch is not None:
                model.model.layers[1].mlp.gate.register_forward_hook(patch)
            events, remove = watch(model, EVERY)
            of_generation(model)
            remove()
            seen.append(events)
        assert_same_events(*seen, tolerance=1e-4)
    # The kernels round inputs to 8 bits, so values are only close; hooks are called all the same.
    packed.set_kernel_backend("auto")
    events, _ = watch(packed, EVERY)
    of_generation(packed)
    assert [event[:3] for event in events] == [event[:3] for event in seen[0]]
