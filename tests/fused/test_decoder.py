"""Steps of decoding in one call of the kernels, against the plain network on torch's cache."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import make_model
from kernel_calls import watched
from olmoe import checkpoint, fused
from olmoe.engine.kv_cache import KVCache
from olmoe.fused import STEP_ROWS, FusedDecoder
from olmoe.model import Decoder
from olmoe.ops import cpu
from packed_folders import packed_folder

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call for a whole step."""
    return watched(monkeypatch)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def steps(network, lengths, count=3, cache_dtype=torch.float32, backend="auto"):
    """Hidden states and routers of the prompts and of `count` steps after them."""
    capacity, dtype = max(lengths) + count, cache_dtype
    cache = KVCache(network.config, len(lengths), capacity, dtype=dtype, device=torch.device("cpu"), backend=backend)
    generator = torch.Generator().manual_seed(1)
    out = []
    with torch.inference_mode():
        ids = torch.randint(0, network.config.vocab_size, (sum(lengths),), generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths])
        out.append(network(ids, positions, cache.attend_prefill(lengths)))
        cache.advance(lengths)
        for _ in range(count):
            ids = torch.randint(0, network.config.vocab_size, (len(lengths),), generator=generator)
            cache.start_decode()
            out.append(network(ids, torch.tensor(cache.lengths), cache.attend_decode))
            cache.advance([1] * len(lengths))
    return out


def both(network, lengths, tolerance, **options):
    """Assert that the fused network does what the plain one does."""
    plain, ours = copy.deepcopy(network), copy.deepcopy(network)
    fused.unfuse(plain)
    fused.fuse(ours)
    assert type(plain.model) is Decoder
    assert type(ours.model) is FusedDecoder
    expected, got = steps(plain, lengths, backend="torch", **options), steps(ours, lengths, **options)
    for left, right in zip(got, expected, strict=True):
        assert left.hidden.dtype == right.hidden.dtype
        close(left.hidden, right.hidden, tolerance)
        assert len(left.routers) == len(right.routers)
        for mine, theirs in zip(left.routers, right.routers, strict=True):
            assert torch.equal(mine.expert_ids, theirs.expert_ids)
            close(mine.logits, theirs.logits, tolerance)
            close(mine.weights, theirs.weights, tolerance)


def close(ours, expected, tolerance):
    assert ours.shape == expected.shape
    assert (ours.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


CHANGES = [
    pytest.param({}, id="released"),
    pytest.param({"num_key_value_heads": 1}, id="grouped queries"),
    pytest.param({"clip_qkv": 0.5, "attention_bias": True, "norm_topk_prob": True}, id="all switches"),
    pytest.param({"num_hidden_layers": 1}, id="one layer"),
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("lengths", [[5], [3, 1, 9]], ids=["alone", "batch"])
def test_plain(changes, lengths, calls):
    network = make_model(**changes)
    both(network, lengths, 1e-5)
    layers = network.config.num_hidden_layers
    assert [len(stack) for stack, *_ in calls] == [layers] * 4  # the short prompt, too


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", ["int8", "int4-high"])
def test_packed(recipe, cache_dtype, calls, tmp_path):
    """To the bit what the same kernels give layer by layer."""
    network = checkpoint.load(packed_folder(tmp_path / "m", recipe, hidden_size=64, intermediate_size=32))
    fused.fuse(network)
    whole = steps(network, [4, 6], cache_dtype=cache_dtype)
    assert [len(stack) for stack, *_ in calls] == [network.config.num_hidden_layers] * 4
    network.model.__class__ = Decoder
    one_by_one = steps(network, [4, 6], cache_dtype=cache_dtype)
    assert len(calls) == 4
    for left, right in zip(whole, one_by_one, strict=True):
        assert torch.equal(left.hidden, right.hidden)
        for mine, theirs in zip(left.routers, right.routers, strict=True):
            assert all(map(torch.equal, mine, theirs))


def test_half_precision(calls):
    network = make_model().bfloat16()
    ours = copy.deepcopy(network)
    fused.fuse(ours)
    expected, got = steps(network, [5], backend="torch"), steps(ours, [5])
    assert len(calls) == 4
    for left, right in zip(got, expected, strict=True):
        assert left.hidden.dtype == torch.bfloat16
        close(left.hidden, right.hidden, 0.1)


def test_what_stands_between_layers_is_seen(calls):
    """A hook on one layer, a layer of another class, one that does not fit: all go layer by layer."""
    for change in (
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer, "__class__", type("Other", (type(layer),), {})),
        lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer, "forward", layer.forward),
    ):
        network = make_model()
        fused.fuse(network)
        change(network.model.layers[1])
        steps(network, [4], count=1)
        assert calls == []


def test_a_hook_sees_each_step():
    network, seen = make_model(), []
    fused.fuse(network)
    network.model.layers[1].register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    steps(network, [4], count=2)
    assert [len(inputs) for inputs in seen] == [4, 1, 1]


def test_long_prompts_can_be_interrupted_between_layers(calls):
    network = make_model(max_position_embeddings=4 * STEP_ROWS)
    fused.fuse(network)
    steps(network, [STEP_ROWS + 1], count=0)
    assert calls == []
    steps(network, [STEP_ROWS], count=0)
    assert [len(stack) for stack, *_ in calls] == [network.config.num_hidden_layers]


def test_threads_do_not_change_a_bit(set_threads):
    network = make_model()
    fused.fuse(network)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append([output.hidden for output in steps(network, [5, 2])])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_a_change_between_two_steps_is_noticed():
    network = make_model()
    fused.fuse(network)
    before = steps(network, [4], count=1)[-1].hidden
    with torch.no_grad():
        network.model.layers[-1].mlp.experts.down_proj.mul_(2.0)
    plain = copy.deepcopy(network)
    fused.unfuse(plain)
    after, expected = steps(network, [4], count=1)[-1].hidden, steps(plain, [4], count=1, backend="torch")[-1].hidden
    close(after, expected, 1e-5)
    assert not torch.allclose(after, before)


def test_models_without_layers():
    network = make_model(num_hidden_layers=1)
    network.model.layers = torch.nn.ModuleList()
    fused.fuse(network)
    assert steps(network, [2], count=1)[-1].routers == []
