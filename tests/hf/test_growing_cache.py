"""The dynamic cache that does not copy: in every use it holds the same as transformers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM
from olmoe.hf import attention
from olmoe.hf.growing_cache import GrowingLayer, growing_layer
from olmoe.ops.cpu import extension

pytestmark = pytest.mark.skipif(not extension.available(), reason="the C++ kernels are not built")

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def states(count, batch=2, dtype=torch.float32):
    """Keys and values of new tokens, different in every call."""
    return torch.randn(batch, 3, count, 4).to(dtype), torch.randn(batch, 3, count, 4).to(dtype)


def pair(config=None):
    """A growing layer in its cache, and transformers' own."""
    mine, theirs = DynamicCache(config=config), DynamicCache(config=config)
    if config is None:  # layers come with the first tokens
        first = states(3)
        mine.update(*first, 0)
        theirs.update(*first, 0)
    layer = growing_layer(mine, 0)
    assert type(layer) is GrowingLayer
    return layer, theirs.layers[0]


def assert_same(mine, theirs):
    assert mine.get_seq_length() == theirs.get_seq_length()
    assert mine.get_mask_sizes(2) == theirs.get_mask_sizes(2)
    assert torch.equal(mine.keys, theirs.keys)
    assert torch.equal(mine.values, theirs.values)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def mode(request):
    with request.param():
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.usefixtures("mode")
def test_the_cache_grows_by_tokens_and_by_prompts():
    mine, theirs = pair()
    for count in [1, 1, 5, 1, 70, *[1] * 120, 300, 1]:
        new = states(count)
        for shown, expected in zip(mine.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(shown, expected)
        assert_same(mine, theirs)


def test_tokens_are_not_copied_while_capacity_lasts():
    with torch.no_grad():
        mine, _ = pair()
        mine.update(*states(1))
        address, moves = mine.keys.data_ptr(), 0
        for _ in range(1000):
            mine.update(*states(1))
            moves += mine.keys.data_ptr() != address
            address = mine.keys.data_ptr()
    assert moves < 15  # 1.25^13 * 70 > 1000


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.reset(),
        lambda layer: layer.offload(),
    ],
    ids=["crop", "reorder", "select", "repeat", "reset", "offload"],
)
def test_states_left_by_other_methods_are_taken_over(change):
    mine, theirs = pair()
    mine_before = mine.update(*(new := states(4)))
    expected_before = [t.clone() for t in theirs.update(*new)]
    change(mine)
    change(theirs)
    batch = 2 if theirs.keys is None else len(theirs.keys)
    for count in (1, 2, 1):
        new = states(count, batch)
        mine.update(*new)
        theirs.update(*new)
        assert_same(mine, theirs)
    for before, expected in zip(mine_before, expected_before, strict=True):
        assert torch.equal(before, expected)  # states that someone still holds are not overwritten


def test_copies_grow_independently():
    with torch.no_grad():
        mine, _ = pair()
        mine.update(*states(2))
        before = mine.keys.clone()
        twins = [copy.copy(mine), copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
        for layer in (mine, *twins):
            layer.update(*(new := states(1)))
            assert torch.equal(layer.keys[:, :, -1:], new[0])
            assert torch.equal(layer.keys[:, :, :-1], before)
        assert len({layer.keys.data_ptr() for layer in (mine, *twins)}) == 4
        assert not torch.equal(mine.keys, twins[0].keys)


def test_cached_states_keep_their_autograd_graph():
    mine, theirs = pair()
    with torch.no_grad():
        new = states(2)
        mine.update(*new)
        theirs.update(*new)
    k, v = (t.requires_grad_() for t in states(1))
    query = torch.randn(2, 3, 1, 4, requires_grad=True)
    (query @ mine.update(k, v)[0].mT).sum().backward(retain_graph=True)
    assert torch.equal(k.grad, query.detach())
    loss = (query @ mine.keys.detach().mT).square().sum()
    with torch.no_grad():
        mine.update(*states(1))  # must not overwrite what the graph has saved
    loss.backward()
    assert torch.isfinite(query.grad).all()


def test_inference_may_precede_training():
    """Keys in memory that inference allocated are saved for backward while inference continues in the same cache."""
    mine, _ = pair()
    with torch.no_grad():
        keys, _ = mine.update(*states(2))
        mine.update(*states(1))
    query = torch.randn(2, 3, 1, 4, requires_grad=True)
    with torch.enable_grad():
        shown, _ = mine.update(*states(1))
        loss = (query @ shown.mT).square().sum()
    with torch.no_grad():
        mine.update(*states(1))
    loss.backward()
    assert torch.isfinite(query.grad).all()
    assert keys.shape[2] == 5


def test_other_dtypes_are_left_to_transformers():
    with torch.no_grad():
        mine, theirs = pair()
        new = states(1, dtype=torch.float64)
        mine.update(*new)
        theirs.update(*new)
        assert_same(mine, theirs)
        assert mine.keys.dtype == torch.float64


def test_only_plain_dynamic_caches_are_changed():
    config = OlmoeConfig(**small_config().to_dict())

    class Other(DynamicCache):
        pass

    for cache in (
        Other(config=config),
        StaticCache(config=config, max_cache_len=8),
        DynamicCache(config=config, offloading=False, offload_only_non_sliding=False),
        None,
    ):
        layer = growing_layer(cache, 0)
        assert (layer is not None) == (type(cache) is DynamicCache)
    assert growing_layer(DynamicCache(), 0) is None  # it has no layer yet
    cache = DynamicCache(config=config)
    cache.offloading = True
    assert growing_layer(cache, 0) is None
    assert type(cache.layers[0]) is DynamicLayer


# ---- in the model ----


def ours(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    implementation = changes.pop("attention", "sdpa")
    return (
        OlmoeForCausalLM(OlmoeConfig(**small_config(**changes).to_dict(), attn_implementation=implementation))
        .to(dtype)
        .eval()
    )


@pytest.fixture
def attended(monkeypatch):
    """Numbers of new tokens in each attention call of the kernels."""
    counts: list[int] = []
    original, filled = GrowingLayer.attend, GrowingLayer.filled

    def record(layer, q, k, v):
        out = original(layer, q, k, v)
        if out is not None:
            counts.append(q.shape[1])
        return out

    def record_one(layer):
        filled(layer)
        counts.append(1)

    monkeypatch.setattr(GrowingLayer, "attend", record)
    monkeypatch.setattr(GrowingLayer, "filled", record_one)
    return counts


@pytest.fixture
def steps(monkeypatch):
    """The number of layers of each step that ran through all of them in one call."""
    counts: list[int] = []
    original = attention.all_layers

    def record(layers, *arguments):
        out = original(layers, *arguments)
        if out is not None:
            counts.append(len(layers))
        return out

    monkeypatch.setattr(attention, "all_layers", record)
    return counts


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_and_steps_equal_torchs(attended, heads, dtype):
    model = ours(dtype, num_key_value_heads=heads)
    results = []
    for backend in ("auto", "torch"):
        model.set_kernel_backend(backend)
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad():
            for start, end in ((0, 5), (5, 6), (6, 7), (7, 9)):  # the last chunk has a mask of its own
                logits.append(model(IDS[:, start:end], past_key_values=cache).logits)
        results.append(torch.cat(logits, dim=1))
    assert attended == [5] * 2 + [1] * 4
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [4, 2])
def test_a_step_through_all_layers_equals_layer_by_layer(steps, heads):
    model = ours(num_key_value_heads=heads, num_hidden_layers=3)
    results = []
    for backend in ("auto", "torch"):
        model.set_kernel_backend(backend)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            outputs = [model(IDS[:, i : i + 1], past_key_values=cache, output_router_logits=True) for i in (3, 0, 4, 4)]
        results.append((cache.layers[2].keys, *((out.logits, *out.router_logits) for out in outputs)))
    assert steps == [3] * 4
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def cropped(model, cache):
    cache.crop(-6)


def reordered(model, cache):
    cache.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize("change", [cropped, reordered])
def test_steps_continue_from_states_left_by_other_methods(steps, change):
    model, results = ours(), []
    for backend in ("auto", "torch"):
        model.set_kernel_backend(backend)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            model(IDS[:, :1], past_key_values=cache)
            change(model, cache)
            results.append([model(IDS[:, i : i + 1], past_key_values=cache).logits for i in (2, 3)])
    assert len(steps) == 3
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def hooked(model, cache):
    model.model.layers[0].register_forward_hook(lambda module, arguments, output: None)


def hooked_inside(model, cache):
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, arguments, output: None)


def replaced(model, cache):
    layer = model.model.layers[1]
    layer.forward = layer.forward


def one_layer_ahead(model, cache):
    cache.layers[1].update(*torch.zeros(2, 2, *cache.layers[1].keys.shape[1:2], 1, cache.layers[1].keys.shape[3]))


@pytest.mark.parametrize("change", [hooked, hooked_inside, replaced, one_layer_ahead])
def test_steps_with_hooks_or_outputs_go_layer_by_layer(steps, change):
    model = ours(num_hidden_layers=2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        change(model, cache)
        before = [layer.get_seq_length() for layer in cache.layers]
        model(IDS[:, :1], past_key_values=cache)
    assert steps == []
    assert [layer.get_seq_length() for layer in cache.layers] == [length + 1 for length in before]


def test_hidden_states_are_collected_layer_by_layer(steps):
    model = ours()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        out = model(IDS[:, :1], past_key_values=cache, output_hidden_states=True)
    assert steps == []
    assert len(out.hidden_states) == 1 + len(model.model.layers)


def test_every_generation_mode_gives_the_same_text(attended):
    model = ours()
    ways = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "no cache": {"use_cache": False},
        "drafts": {"prompt_lookup_num_tokens": 2},
    }
    for name, options in ways.items():
        ids = IDS[:1] if name == "drafts" else IDS
        model.set_kernel_backend("auto")
        actual = model.generate(ids, **GREEDY, **options)
        model.set_kernel_backend("torch")
        assert torch.equal(actual, model.generate(ids, **GREEDY, **options)), name
    assert {1, IDS.shape[1]} <= set(attended)


def test_padding_is_left_to_transformers(attended):
    model = ours()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    actual = model.generate(IDS, attention_mask=mask, **GREEDY)
    assert attended == []
    model.set_kernel_backend("torch")
    assert torch.equal(actual, model.generate(IDS, attention_mask=mask, **GREEDY))


def test_a_cache_can_switch_between_inference_and_training():
    model = ours()
    results = []
    for backend in ("auto", "torch"):
        model.set_kernel_backend(backend)
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS[:, :5], past_key_values=cache)
        model(IDS[:, 5:6], past_key_values=cache).logits.sum().backward()
        with torch.no_grad():
            logits = model(IDS[:, 6:7], past_key_values=cache).logits
        results.append((logits, model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1.0),
        lambda model: setattr(model.model.layers[1].self_attn, "is_causal", False),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.set_kernel_backend("reference"),
        lambda model: model.train().config.__setattr__("attention_dropout", 0.5),
    ],
    ids=["scaling", "not causal", "eager", "reference", "dropout"],
)
def test_other_attention_implementations_are_left_to_transformers(attended, change):
    model = ours(num_hidden_layers=2)
    change(model)
    with torch.no_grad():
        model(IDS, past_key_values=DynamicCache(config=model.config))
    assert len(attended) <= 1  # layer 0 may be unaffected


def test_a_changed_attention_scale_is_respected():
    model = ours()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.scaling = 3.0
        actual = model(IDS).logits
        model.set_kernel_backend("torch")
        torch.testing.assert_close(actual, model(IDS).logits, rtol=1e-4, atol=1e-4)
