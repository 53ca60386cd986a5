"""Steps of decoding with embeddings, angles, final norm and head in one call, against the plain network."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from conftest import make_model
from kernel_calls import watched
from olmoe import checkpoint, fused
from olmoe.config import RopeParameters
from olmoe.engine.kv_cache import KVCache
from olmoe.fused import STEP_ROWS, FusedCausalLM
from olmoe.model import CausalLM
from olmoe.ops import cpu
from packed_folders import packed_folder

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call for a whole step."""
    return watched(monkeypatch)


def heads(calls):
    """The number of rows of the head in each call; 0 for none."""
    return [0 if arguments[-2] is None else arguments[-2].rows for arguments in calls]


def decoded(network, lengths, count=3, start=0, backend="auto"):
    """Logits of `count` steps after prompts of `lengths`, with positions that begin at `start`."""
    cache = KVCache(
        network.config, len(lengths), max(lengths) + count, dtype=torch.float32, device=torch.device("cpu"),
        backend=backend,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    out = []
    with torch.inference_mode():
        ids = torch.randint(0, network.config.vocab_size, (sum(lengths),), generator=generator)
        positions = torch.cat([torch.arange(start, start + length) for length in lengths])
        network(ids, positions, cache.attend_prefill(lengths))
        cache.advance(lengths)
        for _ in range(count):
            ids = torch.randint(0, network.config.vocab_size, (len(lengths),), generator=generator)
            cache.start_decode()
            positions = torch.tensor(cache.lengths) + start
            out.append(network.step(ids, positions, cache.attend_decode, positions + 1))
            cache.advance([1] * len(lengths))
    return torch.stack(out)


def close(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def both(network, lengths, **options):
    """Logits of the plain network and of a fused copy."""
    ours = copy.deepcopy(network)
    fused.fuse(ours)
    assert type(ours) is FusedCausalLM
    return decoded(network, lengths, backend="torch", **options), decoded(ours, lengths, **options)


@pytest.mark.parametrize("lengths", [[5], [3, 1, 9]], ids=["alone", "batch"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"vocab_size": 77},
        {"rope": RopeParameters(rope_type="linear", factor=2.0)},
    ],
    ids=["released", "tied", "rows that fill no group", "linear RoPE"],
)
def test_logits(changes, lengths, calls):
    network = make_model(**changes)
    expected, got = both(network, lengths)
    close(got, expected)
    assert heads(calls)[-3:] == [network.config.vocab_size] * 3


def test_angles_are_looked_up_wherever_positions_are(calls):
    """Beyond the first table, and where angles depend on the length of a sequence."""
    expected, got = both(make_model(max_position_embeddings=4096), [3], start=1000)
    close(got, expected)
    dynamic = RopeParameters(rope_type="dynamic", factor=2.0)
    expected, got = both(make_model(max_position_embeddings=8, rope=dynamic), [4, 7], count=5)
    close(got, expected)
    assert len(calls) > 8  # prompts may add theirs
    assert 0 not in heads(calls)[-5:]


def test_packed_heads_have_the_bits_of_their_module(calls, tmp_path):
    network = checkpoint.load(packed_folder(tmp_path / "m", "int4", hidden_size=64, intermediate_size=32))
    fused.fuse(network)
    whole = decoded(network, [4, 6])
    assert heads(calls)[-3:] == [network.config.vocab_size] * 3
    network.__class__ = CausalLM
    calls.clear()
    assert torch.equal(whole, decoded(network, [4, 6]))
    assert not any(heads(calls))


def test_half_precision_goes_the_usual_way(calls):
    network = make_model().bfloat16()
    expected, got = both(network, [5])
    close(got.float(), expected.float(), 0.1)
    assert not any(heads(calls))


def whole_steps(network, calls):
    calls.clear()
    decoded(network, [4], count=1)
    return bool(calls and heads(calls)[-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.lm_head.register_forward_hook(lambda *_: None),
        lambda m: m.model.register_forward_hook(lambda *_: None),
        lambda m: m.model.norm.register_forward_pre_hook(lambda *_: None),
        lambda m: m.model.embed_tokens.register_forward_hook(lambda *_: None),
        lambda m: m.model.rotary.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.lm_head, "forward", m.lm_head.forward),
        lambda m: setattr(m.model, "forward", m.model.forward),
        lambda m: setattr(m.model.norm, "backend", "torch"),
        lambda m: setattr(m.lm_head, "backend", "reference"),
        lambda m: setattr(m, "lm_head", nn.Linear(32, m.config.vocab_size, bias=False)),
        lambda m: setattr(m.model.embed_tokens, "max_norm", 1.0),
        lambda m: m.model.layers[0].self_attn.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(m.config.vocab_size))),
    ],
)
def test_what_is_not_the_networks_own_gets_its_call(change, calls):
    """Also where it appears after steps without it, and the one call comes back when it is gone."""
    network = make_model()
    fused.fuse(network)
    assert whole_steps(network, calls)
    other = copy.deepcopy(network)
    assert whole_steps(other, calls)
    undo = change(other)
    assert not whole_steps(other, calls)
    if hasattr(undo, "remove"):
        undo.remove()
        assert whole_steps(other, calls)


def test_changes_between_steps_are_noticed(calls):
    network = make_model()
    fused.fuse(network)
    before = decoded(network, [4], count=1)
    changes = (
        lambda m: m.lm_head.weight.data.mul_(2.0),
        lambda m: setattr(m.lm_head.weight, "data", 0.5 * m.lm_head.weight.data),
        lambda m: setattr(m.model.norm, "weight", nn.Parameter(1.5 * m.model.norm.weight.detach())),
        lambda m: setattr(m.model.norm, "eps", 10.0),
        lambda m: m.model.embed_tokens.weight.data.mul_(3.0),
        lambda m: setattr(m.model.rotary, "rope", RopeParameters(rope_theta=3.0)),
        lambda m: m.model.layers[0].self_attn.q_norm.weight.data.mul_(2.0),
    )
    for change in changes:
        ours = copy.deepcopy(network)
        assert torch.equal(decoded(ours, [4], count=1), before)
        change(ours)
        plain = copy.deepcopy(ours)
        fused.unfuse(plain)
        assert type(plain) is CausalLM
        after = decoded(ours, [4], count=1)
        close(after, decoded(plain, [4], count=1, backend="torch"))
        assert not torch.allclose(after, before)
        assert heads(calls)[-1]


def test_many_sequences_go_the_usual_way(calls):
    network = make_model()
    expected, got = both(network, [1] * (STEP_ROWS + 1), count=1)
    close(got, expected)
    assert heads(calls)[-1:] != [network.config.vocab_size]


def test_ids_outside_the_vocabulary():
    network = make_model()
    fused.fuse(network)
    cache = KVCache(network.config, 1, 4, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        network(torch.tensor([1]), torch.tensor([0]), cache.attend_prefill([1]))
        cache.advance([1])
        for wrong in (-1, network.config.vocab_size):
            with pytest.raises(IndexError, match=str(wrong)):
                network.step(torch.tensor([wrong]), torch.tensor([1]), cache.attend_decode)


def test_embeddings_that_were_replaced_by_fewer():
    """The module's own count is still the old one, and would let a kernel read beyond the new weight."""
    network = make_model()
    fused.fuse(network)
    embedding = network.model.embed_tokens
    embedding.weight = nn.Parameter(embedding.weight.detach()[:5].clone())
    assert embedding.num_embeddings > 5
    cache = KVCache(network.config, 1, 4, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        network(torch.tensor([1]), torch.tensor([0]), cache.attend_prefill([1]))
        cache.advance([1])
        with pytest.raises(IndexError, match="5"):
            network.step(torch.tensor([5]), torch.tensor([1]), cache.attend_decode)


def test_copies_and_pickles_leave_the_kernels_views_behind(calls):
    network = make_model()
    fused.fuse(network)
    expected = decoded(network, [3])
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not {"_head", "_prepared"} & set(vars(twin))
        assert "_whole" not in vars(twin.model)
        assert torch.equal(decoded(twin, [3]), expected)


def test_routers_of_a_step():
    """Kept together, they are still a sequence of what each layer's router decided."""
    network = make_model(num_hidden_layers=3)
    fused.fuse(network)
    cache = KVCache(network.config, 1, 4, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        network(torch.tensor([1]), torch.tensor([0]), cache.attend_prefill([1]))
        cache.advance([1])
        routers = network(torch.tensor([2]), torch.tensor([1]), cache.attend_decode).routers
    assert len(routers) == 3
    listed = list(routers)
    assert len(listed) == 3
    assert torch.equal(routers[-1].logits, listed[2].logits)
    assert [torch.equal(a.weights, b.weights) for a, b in zip(routers[1:], listed[1:], strict=True)] == [True, True]
    with pytest.raises(IndexError):
        routers[3]
