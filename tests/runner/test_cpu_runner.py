"""The runner on the kernels against the plain network for every configuration; what it refuses and does not notice."""

from __future__ import annotations

import pytest
import torch

from configurations import CASES
from conftest import make_model
from olmoe.runner import Batch, CacheView, CpuRunner, TorchRunner, Unfit, Want
from packed_folders import WHOLE
from runner_calls import chunked, error, prompt, tables, together

pytestmark = pytest.mark.usefixtures("kernels")
FITTING = [case for case in CASES if case.name != "gelu"]


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.name)
def test_logits_are_those_of_the_network(case, isa):
    model = make_model(**case.changes)
    ours, plain = CpuRunner(model), TorchRunner(model, "reference")
    prompts = [prompt(case.tokens), prompt(case.tokens + 5, seed=1)]
    for left, right in zip(together(ours, prompts), together(plain, prompts), strict=True):
        assert error(left, right) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, isa):
    """The kernels keep hidden states in fp32, so they are nearer to the weights' exact network than torch is."""
    model = make_model().to(dtype)
    exact = together(TorchRunner(make_model().to(dtype).float(), "reference"), [prompt(20)])
    for left, right in zip(together(CpuRunner(model), [prompt(20)]), exact, strict=True):
        assert error(left, right) < (4e-2 if dtype == torch.bfloat16 else 4e-3)


def test_only_the_rows_that_are_wanted(isa):
    runner, ids = CpuRunner(make_model()), prompt(12)
    cache = runner.new_cache(1, 12)
    view = CacheView(cache, tables(cache, 1))
    rows = runner.forward(Batch(ids, [12], [0]), view, Want([11, 0, 5])).logits
    every = runner.forward(Batch(ids, [12], [0]), view, Want(range(12))).logits
    assert torch.equal(rows, every[[11, 0, 5]])
    none = runner.forward(Batch(ids, [12], [0]), view, Want([]))
    assert none.logits.shape == (0, 320)
    assert none.trace is None


def with_change(change):
    model = make_model()
    change(model)
    return model


def unfit_models():
    hooked = make_model()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *arguments: None)
    replaced = make_model()
    replaced.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)
    reference = make_model()
    reference.model.norm.backend = "reference"
    epsilon = make_model()
    epsilon.model.layers[0].self_attn.q_norm.eps = 1e-3
    return [
        ("hooks", hooked),
        ("Linear", replaced),
        ("backend reference", reference),
        ("epsilon", epsilon),
        ("float64", make_model().double()),
        ("activation", make_model(hidden_act="gelu")),
        ("largest norm", with_change(lambda m: setattr(m.model.embed_tokens, "max_norm", 1.0))),
        ("bias", with_change(lambda m: setattr(m.lm_head, "bias", torch.nn.Parameter(torch.ones(320))))),
        ("without layers", with_change(lambda m: setattr(m.model, "layers", torch.nn.ModuleList()))),
        ("CausalLM", with_change(lambda m: setattr(m, "forward", m.forward))),
        ("Decoder", with_change(lambda m: setattr(m.model, "forward", m.model.forward))),
        ("RotaryEmbedding", with_change(lambda m: setattr(m.model.rotary, "forward", m.model.rotary.forward))),
        ("dtypes", with_change(lambda m: m.model.layers[1].bfloat16())),
    ]


@pytest.mark.parametrize(("reason", "model"), unfit_models(), ids=[reason for reason, _ in unfit_models()])
def test_says_what_it_cannot_compute(reason, model):
    with pytest.raises(Unfit, match=reason):
        CpuRunner(model)


def test_does_not_run_without_kernels(absent):
    with pytest.raises(Unfit, match="not installed"):
        CpuRunner(make_model())


def test_runners_over_one_model_are_independent():
    model = make_model(**WHOLE)
    kernels, plain = CpuRunner(model), TorchRunner(model, "reference")
    expected = chunked(kernels, prompt(10), [10])
    before = chunked(plain, prompt(10), [10])
    again = CpuRunner(model)
    TorchRunner(model, "torch")
    assert torch.equal(chunked(kernels, prompt(10), [10]), expected)
    assert torch.equal(chunked(again, prompt(10), [10]), expected)
    assert torch.equal(chunked(plain, prompt(10), [10]), before)
    assert {m.backend for m in model.modules() if "backend" in vars(m)} <= {"auto"}


@pytest.mark.parametrize("kind", [CpuRunner, TorchRunner])
def test_is_what_the_model_was(kind):
    """Replaced weights and hooks count in a new runner."""
    model = make_model()
    runner, ids = kind(model), prompt(9)
    before = chunked(runner, ids, [9])
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.model.layers[0].register_forward_hook(lambda *arguments: pytest.fail("hooked later"))
    assert torch.equal(chunked(runner, ids, [9]), before)
    model.model.layers[0]._forward_hooks.clear()
    assert not chunked(kind(model), ids, [9]).any()


def test_weights_outlive_the_model():
    model = make_model()
    expected = chunked(CpuRunner(model), prompt(9), [9])
    runner = CpuRunner(model)
    del model
    assert torch.equal(chunked(runner, prompt(9), [9]), expected)


@pytest.mark.parametrize("kind", [CpuRunner, TorchRunner])
@pytest.mark.parametrize("foreign", [-1, 320, 2**40])
def test_foreign_ids(kind, foreign):
    with pytest.raises(IndexError, match="not all below 320"):
        chunked(kind(make_model()), [1, foreign, 2], [3])


def test_embeddings_that_were_replaced_by_fewer():
    """The module's own count is still the old one, and would let a kernel read beyond the new weight."""
    model = make_model()
    embedding = model.model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight.detach()[:5].clone())
    assert embedding.num_embeddings > 5
    runner = CpuRunner(model)
    assert torch.isfinite(chunked(runner, [1, 4], [2])).all()
    with pytest.raises(IndexError, match="5"):
        chunked(runner, [1, 5], [2])


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 77},
        {"clip_qkv": 0.5, "attention_bias": True, "norm_topk_prob": True},
        {"num_hidden_layers": 1},
    ],
    ids=["rows that fill no group", "all switches", "one layer"],
)
def test_other_shapes(changes, isa):
    model = make_model(**changes)
    ours, plain = CpuRunner(model), TorchRunner(model, "reference")
    prompts = [[i % 77 for i in prompt(9)], [3], [i % 77 for i in prompt(5, seed=1)]]
    for left, right in zip(together(ours, prompts), together(plain, prompts), strict=True):
        assert error(left, right) < 1e-5


def test_positions_beyond_the_first_table_of_angles():
    model = make_model(max_position_embeddings=4096)
    ids = prompt(700)
    ours, plain = CpuRunner(model), TorchRunner(model, "torch")
    assert error(chunked(ours, ids, [300, 400]), chunked(plain, ids, [700])) < 1e-5
