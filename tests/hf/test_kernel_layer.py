"""Fused layers: the results of plain ones wherever the kernels apply, and plain code elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import make_model
from kernel_layers import WIDTH, attend, both, fits, random, rotations, run, same, through_kernels
from kernel_layers import plain as unfused
from olmoe.errors import BackendUnavailableError, UserError
from olmoe.hf import kernel_layer
from olmoe.hf.kernel_layer import KernelDecoderLayer
from olmoe.model import DecoderLayer, Linear, set_backend
from olmoe.ops import cpu
from olmoe.runner import require_backend
from olmoe.weights import checkpoint
from packed_folders import WHOLE, packed_folder
from sentences import refused

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")


CONFIGURATIONS = [
    pytest.param({}, id="released"),
    pytest.param({"clip_qkv": 0.5}, id="clipping that bites"),
    pytest.param({"norm_topk_prob": True}, id="renormalised routing weights"),
    pytest.param({"num_key_value_heads": 2}, id="GQA"),
    pytest.param({"num_key_value_heads": 1, "clip_qkv": 0.7}, id="MQA"),
    pytest.param({"attention_bias": True}, id="attention bias"),
    pytest.param({"num_experts_per_tok": 1}, id="K=1"),
    pytest.param({"num_experts_per_tok": 8}, id="K=E"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"intermediate_size": 5}, id="odd expert width"),
    pytest.param({"intermediate_size": 64}, id="wide experts"),
    pytest.param({"hidden_size": 36, "num_attention_heads": 3}, id="heads of 12, a hidden width of no vector"),
    pytest.param({"num_experts": 5, "num_attention_heads": 2}, id="five experts"),
    pytest.param({"rms_norm_eps": 0.1}, id="an epsilon that matters"),
]
SHAPES = [
    pytest.param((1, 1), id="one token of a batch"),
    pytest.param((1,), id="one flat token"),
    pytest.param((2, 4), id="batch"),
    pytest.param((7,), id="flat tokens"),
]


@pytest.mark.parametrize("changes", CONFIGURATIONS)
def test_fp32_layers_equal_plain_ones(changes, poisoned):
    model = make_model(**changes)
    for shape in ((1, 1), (1,), (2, 4), (7,)):
        x = random(*shape, model.config.hidden_size)
        same(*both(model, x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", CONFIGURATIONS[:7])
def test_half_precision_layers_match_plain_ones(changes, dtype, poisoned):
    """The plain layer rounds between operations, the kernels only at the end."""
    model = make_model(**changes).to(dtype)
    same(*both(model, random(2, 4, WIDTH, dtype=dtype)), 2**-4 if dtype == torch.bfloat16 else 2**-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_may_have_any_memory_layout(shape):
    model = make_model()
    x = random(WIDTH, *shape).movedim(0, -1)
    same(*both(model, x), 1e-5)
    wide = random(*shape, 2 * WIDTH)[..., ::2]
    same(*both(model, wide), 1e-5)


def test_rope_tables_may_be_shared_by_rows_and_of_other_dtypes():
    model = make_model()
    x, layer = random(2, 4, WIDTH), 0
    expected = run(model, x)
    through_kernels(model)
    cos, sin = model.model.rotary(torch.arange(4))
    for rope in ((cos, sin), (cos[None].double(), sin[None].double()), (cos.T.contiguous().T, sin.T.contiguous().T)):
        with torch.inference_mode():
            same(expected, model.model.layers[layer](x, rope, attend), 1e-5)


PACKED = [
    pytest.param("int8", WHOLE, id="q8_0"),
    pytest.param("q4_0", WHOLE, id="q4_0"),
    pytest.param("int4", WHOLE | {"attention_bias": True, "num_key_value_heads": 2}, id="mixed, with biases"),
    pytest.param("int4", {"intermediate_size": 12}, id="down_proj plain"),
    pytest.param("q4_0", {"hidden_size": 40, "intermediate_size": 64}, id="only down_proj packed"),
    pytest.param("int8", {"hidden_size": 96, "intermediate_size": 64, "num_experts_per_tok": 1}, id="odd blocks"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("recipe", "changes"), PACKED)
def test_packed_layers_match_plain_ones(recipe, changes, dtype, tmp_path, poisoned):
    """The kernels round activations where the plain layer decodes weights; that is the only difference."""
    model = checkpoint.load(packed_folder(tmp_path / "m", recipe, **changes), dtype=dtype)
    tolerance = {torch.float32: 5e-3, torch.bfloat16: 2**-4, torch.float16: 2**-5}[dtype]
    if 12 in changes.values() or 40 in changes.values():
        tolerance = max(tolerance, 3e-2)
    for shape in ((1, 1), (2, 9), (13,)):  # more rows than the kernels prefer
        plain, ours = both(model, random(*shape, model.config.hidden_size, dtype=dtype))
        assert (plain[0] - ours[0]).float().abs().max() <= tolerance * plain[0].float().abs().max()
        agreement = (plain[1].expert_ids == ours[1].expert_ids).float().mean()
        assert agreement > 0.8  # equal except where two experts are equally good
        assert ours[0].dtype == plain[0].dtype == dtype


def alone(q, k, v, layer):
    """Attention of each token to itself only."""
    return v.repeat_interleave(q.shape[-2] // v.shape[-2], dim=-2)


def test_threads_and_other_tokens_do_not_change_a_bit(tmp_path):
    model = checkpoint.load(packed_folder(tmp_path / "m", "int4", **WHOLE))
    x = random(12, WIDTH)
    through_kernels(model)
    before, expected = torch.get_num_threads(), run(model, x, attend=alone)
    rope = rotations(model, x)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            ours = run(model, x, attend=alone)
            assert torch.equal(ours[0], expected[0])
            assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))
    finally:
        torch.set_num_threads(before)
    with torch.inference_mode():
        for i in range(12):
            row = model.model.layers[0](x[i : i + 1], tuple(t[i : i + 1] for t in rope), alone)
            assert torch.equal(row[0], expected[0][i : i + 1])


def test_more_tokens_than_one_expert_block(tmp_path):
    model = checkpoint.load(packed_folder(tmp_path / "m", "int8", **WHOLE))
    x = random(1030, WIDTH)
    through_kernels(model)
    whole, parts = run(model, x, attend=alone), [run(model, part, attend=alone) for part in x.split(100)]
    assert torch.equal(whole[0], torch.cat([y for y, _ in parts]))
    assert torch.equal(whole[1].expert_ids, torch.cat([routed.expert_ids for _, routed in parts]))


# ---- left to torch ----


@pytest.mark.parametrize("many", [True, False], ids=["prompts too", "few rows only"])
def test_the_kernels_run_where_supported(many, monkeypatch):
    monkeypatch.setattr(kernel_layer, "many_rows", lambda dtype: many and dtype == torch.float32)
    model = make_model()
    through_kernels(model)
    layer = model.model.layers[0]
    assert type(layer) is KernelDecoderLayer
    with torch.inference_mode():
        assert fits(model, random(8, WIDTH))
        assert fits(model, random(9, WIDTH)) == many  # otherwise torch is faster
        assert not fits(model, random(0, WIDTH))
        assert not fits(model, random(2, WIDTH, dtype=torch.bfloat16))
        set_backend(model, "cpu")
        assert fits(model, random(9, WIDTH))  # requested by name
        for backend in ("torch", "reference"):
            set_backend(model, backend)
            assert not fits(model, random(2, WIDTH))
    unfused(model)
    assert type(layer) is DecoderLayer
    assert "_view" not in vars(layer)


class Adapter(nn.Module):
    """The kind of wrapper that LoRA puts around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low = base, nn.Parameter(torch.full((1, base.in_features), 0.1))

    def forward(self, x):
        return self.base(x) + (x * self.low).sum(-1, keepdim=True)


class Subclass(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked_block(layer):
    layer.mlp.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))


def hooked_input(layer):
    layer.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def transposed(layer):
    weight = layer.self_attn.q_proj.weight
    weight.data = weight.data.T


def as_subclass(layer):
    layer.self_attn.o_proj.__class__ = Subclass


def own_forward(layer):
    forward = layer.mlp.gate.forward
    layer.mlp.gate.forward = lambda x: forward(2 * x)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(hooked_block, id="hook of a block"),
        pytest.param(hooked_input, id="hook of an input"),
        pytest.param(lambda layer: setattr(layer.self_attn, "v_proj", Adapter(layer.self_attn.v_proj)), id="adapter"),
        pytest.param(as_subclass, id="subclass"),
        pytest.param(own_forward, id="a forward of its own, as accelerate sets"),
        pytest.param(lambda layer: setattr(layer.mlp.experts, "activation", torch.tanh), id="another activation"),
        pytest.param(lambda layer: setattr(layer.self_attn.k_norm, "eps", 0.5), id="another epsilon in one norm"),
        pytest.param(lambda layer: setattr(layer.self_attn.o_proj, "backend", "torch"), id="one module's backend"),
        pytest.param(transposed, id="a transposed weight"),
    ],
)  # fmt: skip
def test_unsupported_inputs_run_on_torch(change):
    """Also if the kernels ran before."""
    ours, plain, x = make_model(), make_model(), random(4, WIDTH)
    through_kernels(ours)
    before = run(ours, x)[0]
    for model in (ours, plain):
        change(model.model.layers[0])
    with torch.inference_mode():
        assert not fits(ours, x)
    same(run(plain, x), run(ours, x), 1e-6)
    assert not torch.allclose(run(ours, x)[0], before) or "backend" in vars(ours.model.layers[0].self_attn.o_proj)


def test_global_hooks_see_every_module():
    model, x, seen = make_model(), random(2, WIDTH), []
    through_kernels(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    try:
        run(model, x)
    finally:
        handle.remove()
    assert Linear in seen


def test_gradients_equal_those_of_the_plain_layer():
    """Of x, and of weights when x itself needs none, as after a frozen embedding."""
    for needs in (True, False):
        gradients = []
        for fuse in (False, True):
            model, x = make_model(), random(2, WIDTH).requires_grad_(needs)
            if fuse:
                through_kernels(model)
            model.model.layers[0](x, rotations(model, x), attend)[0].square().sum().backward()
            gradients.append([x.grad] + [p.grad for p in model.model.layers[0].parameters()])
        for plain, ours in zip(*gradients, strict=True):
            assert (plain is None) == (ours is None)
            assert plain is None or torch.equal(plain, ours)
        assert gradients[1][1] is not None
    model.requires_grad_(False)
    assert fits(model, random(2, WIDTH))  # with gradients on, but none to compute


def test_gradients_through_cached_keys_of_a_frozen_model():
    gradients = []
    for fuse in (False, True):
        model, x, prefix = make_model().requires_grad_(False), random(1, 3, WIDTH), random(1, 2, WIDTH, seed=1)
        prefix.requires_grad_()
        if fuse:
            through_kernels(model)
            assert fits(model, x)

        def attend_behind(q, k, v, layer, prefix=prefix):
            cached = prefix.view(1, 2, *k.shape[2:])
            scores = torch.einsum("bthd,bshd->bhts", q, torch.cat([cached, k], dim=1)).softmax(dim=-1)
            return torch.einsum("bhts,bshd->bthd", scores, torch.cat([cached, v], dim=1))

        y, routed = model.model.layers[0](x, rotations(model, x), attend_behind)
        (y.square().sum() + routed.logits.square().sum()).backward()
        gradients.append(prefix.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_the_layer_compiles_into_one_graph():
    model, x = make_model(), random(2, WIDTH)
    expected = run(model, x)
    through_kernels(model)
    rope = rotations(model, x)
    with torch.no_grad():
        layer = torch.compile(model.model.layers[0], backend="eager", fullgraph=True)
        same(expected, layer(x, rope, attend), 1e-6)


def test_meta_tensors():
    model = make_model()
    through_kernels(model)
    run(model, random(2, WIDTH))
    model.to("meta")
    set_backend(model, "torch")
    layer = model.model.layers[0]
    with torch.inference_mode():
        assert not fits(model, torch.empty(2, WIDTH, device="meta"))
        assert layer._fitting(random(2, WIDTH), rotations(model, random(2, WIDTH))) is None
        set_backend(model, "auto")
        assert layer._fitting(random(2, WIDTH), rotations(model, random(2, WIDTH))) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_a_gpu_and_back():
    model, x = make_model(), random(2, WIDTH)
    through_kernels(model)
    expected = run(model, x)
    model.cuda()
    rope = tuple(t.cuda() for t in rotations(model, x))
    with torch.inference_mode():
        y, _ = model.model.layers[0](x.cuda(), rope, attend)
    assert y.is_cuda
    assert torch.allclose(y.cpu(), expected[0], atol=1e-4)
    same(expected, run(model.cpu(), x), 0.0)


# ---- requested by name but unavailable ----


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m, x: (make_model(hidden_act="gelu"), x), id="another activation"),
        pytest.param(lambda m, x: (m, x.clone().requires_grad_()), id="gradients"),
        pytest.param(lambda m, x: (m.double(), x.double()), id="fp64"),
        pytest.param(lambda m, x: (m.to("meta"), x.to("meta")), id="meta"),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error(change):
    model, x = change(make_model(), random(2, WIDTH))
    through_kernels(model)
    set_backend(model, "cpu")
    rope = rotations(model, random(2, WIDTH))
    with torch.set_grad_enabled(x.requires_grad):
        message = refused(lambda: model.model.layers[0](x, rope, attend), BackendUnavailableError)
    assert "'cpu'" in message


def test_unknown_names_are_refused():
    assert "'gpu'" in refused(lambda: require_backend("gpu"), UserError)
    for name in ("auto", "cpu", "torch", "reference"):
        require_backend(name)
