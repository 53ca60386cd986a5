"""The training kernels: tile borders of products, threads, saved memory, and what is left to torch.

tests/ops/test_parity.py has ordinary shapes; its backend "torch" computes with these kernels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops
from olmoe.ops import torch_fast
from olmoe.ops.cpu import causal, training
from ops.cpu.matrices import error, random
from ops.cpu.training_calls import CALLS, attention, attention_inputs, doubled, gradients, leaf, moe, moe_inputs


@pytest.fixture
def kernels_only(monkeypatch):
    """Fail where torch's own formulation would be used."""

    def refuse(*arguments):
        raise AssertionError("computed by torch")

    for name in ("_moe", "_experts", "_apply_rope", "_route", "twice_differentiable"):
        monkeypatch.setattr(torch_fast, name, refuse)


@pytest.mark.parametrize(
    ("n", "columns", "rows"),
    [
        pytest.param(1, 1, 1, id="one number"),
        pytest.param(6, 16, 64, id="one tile"),
        pytest.param(7, 129, 65, id="one more of each than a tile has"),
        pytest.param(13, 300, 37, id="several depths, less than a panel"),
        pytest.param(300, 40, 520, id="more rows and columns than are gone through at a time"),
    ],
)
def test_linear(n, columns, rows, isa):
    inputs = [leaf(n, columns), leaf(rows, columns, seed=1, scale=columns**-0.5), leaf(rows, seed=2)]
    ours, expected = gradients(ops.linear, inputs), gradients(F.linear, doubled(inputs))
    assert error(ours[0], expected[0].float()) < 2e-6
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        assert error(mine, theirs.float()) < 2e-6


@pytest.mark.parametrize(
    ("n", "e", "k", "d", "f"),
    [
        pytest.param(1, 4, 1, 1, 1, id="one number"),
        pytest.param(50, 64, 8, 33, 17, id="odd widths"),
        pytest.param(700, 2, 1, 130, 70, id="more rows of an expert than a block has"),
        pytest.param(20, 30, 2, 300, 140, id="experts without rows, more columns than a band"),
    ],
)
def test_moe(n, e, k, d, f, isa):
    inputs = moe_inputs(n, e, k, d, f)
    ours = gradients(moe, inputs)
    expected = gradients(
        lambda *t: ops.moe(*t, F.silu, backend="reference"),
        [t.detach().requires_grad_(t.requires_grad) for t in inputs],
    )
    assert error(ours[0], expected[0]) < 2e-6
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        assert error(mine, theirs) < 5e-6


@pytest.mark.parametrize(("n", "e", "k"), [(1, 1, 1), (70, 64, 8), (33, 7, 7), (20, 5, 1)])
def test_route(n, e, k, kernels_only):
    x = leaf(n, e, scale=3.0)
    weights, ids = ops.route(x, k)
    exact = doubled([x])[0]
    expected, expected_ids = exact.softmax(-1).topk(k, -1)
    assert torch.equal(ids, expected_ids)
    assert not ids.requires_grad
    assert error(weights.detach(), expected.detach().float()) < 2e-6
    grad = random(n, k, seed=9)
    (ours,), (theirs,) = torch.autograd.grad(weights, x, grad), torch.autograd.grad(expected, exact, grad.double())
    assert float((ours - theirs).abs().max()) < 1e-6  # zero up to rounding for a single expert


def test_ties_between_experts_choose_the_first():
    x = torch.zeros(3, 6)
    x[1, 4], x[2, [1, 3, 5]] = 1.0, 2.0
    _, ids = ops.route(x.requires_grad_(), 3)
    assert ids.tolist() == [[0, 1, 2], [4, 0, 1], [1, 3, 5]]


def test_nan_scores_choose_valid_experts():
    x = torch.full((3, 6), float("nan"))
    x[1] = float("inf")
    x[2] = torch.tensor([-float("inf")] * 4 + [0.0] * 2)
    weights, ids = ops.route(x.requires_grad_(), 3)
    assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in ids.tolist())
    assert weights.isnan().any(dim=1).tolist() == [True, True, False]


def torch_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    ("batch", "query_heads", "kv_heads", "tokens", "head_dim"),
    [
        pytest.param(1, 1, 1, 1, 1, id="one number"),
        pytest.param(3, 4, 2, 1, 32, id="one token"),
        pytest.param(2, 3, 3, 7, 5, id="odd widths"),
        pytest.param(2, 4, 4, 64, 32, id="one block"),
        pytest.param(1, 4, 1, 65, 64, id="one token more, one KV head"),
        pytest.param(2, 6, 2, 97, 33, id="odd length and width, grouped heads"),
        pytest.param(1, 2, 2, 257, 48, id="more tokens than are gone through at a time"),
        pytest.param(1, 2, 1, 400, 128, id="wide heads"),
        pytest.param(1, 1, 1, 70, 256, id="the widest"),
    ],
)
def test_attention(batch, query_heads, kv_heads, tokens, head_dim, isa):
    inputs = attention_inputs(batch, query_heads, kv_heads, tokens, head_dim)
    ours = gradients(attention, inputs)
    expected = gradients(torch_attention, doubled(inputs))
    assert error(ours[0], expected[0].float()) < 2e-6
    # The gradients of a single token's scores are zero, which fp32 products only approximate.
    for mine, theirs, x in zip(ours[1], expected[1], inputs, strict=True):
        assert mine.shape == x.shape
        assert float((mine - theirs).abs().max()) < 5e-6 * max(float(theirs.abs().max()), 1.0)
    if tokens == 1 and isa != "scalar":
        assert not any(grad.any() for grad in ours[1][:2])  # it is the only one, whatever its score


def test_attention_is_causal(kernels_only):
    """Checked by which outputs change with a token, and which tokens a gradient reaches."""
    inputs = attention_inputs(1, 2, 2, 150, 32)
    before = attention(*inputs)
    changed = [t.detach().clone() for t in inputs]
    for t in changed:
        t[:, :, 70:] = random(1, 2, 80, 32, seed=5)
    after = attention(changed[0].requires_grad_(), *changed[1:])
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert not torch.equal(before[:, :, 70], after[:, :, 70])
    for grad in torch.autograd.grad(before[:, :, :70].sum(), inputs):
        assert not grad[:, :, 70:].any()
        assert grad[:, :, 69].any()


@pytest.mark.parametrize(
    ("scale", "tolerance"), [(1e-3, 5e-6), (30.0, 5e-4)], ids=["scores near zero", "scores that differ much"]
)
def test_attention_with_extreme_scores(scale, tolerance, isa):
    """Scores of several thousand have an error of about a thousandth in fp32."""
    inputs = attention_inputs(1, 2, 2, 130, 32, scale=scale)
    ours, expected = gradients(attention, inputs), gradients(torch_attention, doubled(inputs))
    assert error(ours[0], expected[0].float()) < tolerance
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        assert torch.isfinite(mine).all()
        assert error(mine, theirs.float()) < tolerance


def test_attention_of_strided_and_expanded_tensors(kernels_only):
    """Heads first, every second number of a row, keys shared by all examples, and an expanded scalar gradient."""
    q, k, v = (t.detach() for t in attention_inputs(2, 4, 2, 70, 32))
    expected = gradients(torch_attention, [t.clone().requires_grad_() for t in (q, k[:1].expand_as(k), v)])
    spread = torch.zeros(2, 2, 70, 64)
    spread[..., ::2] = v
    inputs = [q.contiguous().requires_grad_(), k[:1].expand_as(k).requires_grad_(), spread[..., ::2].requires_grad_()]
    ours = gradients(attention, inputs)
    assert error(ours[0], expected[0]) < 2e-6
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        assert error(mine, theirs) < 5e-6
    whole = torch.autograd.grad(attention(*inputs).sum(), inputs)
    for mine, theirs in zip(whole, torch.autograd.grad(torch_attention(*inputs).sum(), inputs), strict=True):
        assert error(mine, theirs) < 5e-6


@pytest.mark.parametrize("lengths", [[1] * 5, [9, 1, 70, 2, 300, 64], [400]], ids=str)
@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_of_several_texts_is_computed_as_if_it_were_alone(lengths, products, kernels_only):
    """With the same bits, forward and backward, in one call."""
    if products is not None and not training.takes_products(products, torch.ones(1)):
        pytest.skip("this CPU has no instruction for it")
    inputs = [leaf(sum(lengths), heads, 48, seed=i) for i, heads in enumerate((4, 2, 2))]
    out = ops.isolated_attention(*inputs, lengths, products=products)
    direction = random(*out.shape, seed=9)
    found = torch.autograd.grad(out, inputs, direction)
    start = 0
    for length in lengths:
        at = slice(start, start + length)
        alone = [t.detach()[at].transpose(0, 1).unsqueeze(0).requires_grad_() for t in inputs]
        one = ops.attention(*alone, causal=True, products=products)
        assert torch.equal(out[at], one[0].transpose(0, 1))
        gradients = torch.autograd.grad(one, alone, direction[at].transpose(0, 1).unsqueeze(0))
        for ours, theirs in zip(found, gradients, strict=True):
            assert torch.equal(ours[at], theirs[0].transpose(0, 1))
        start += length


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)], ids=str)
def test_gradients_of_some_inputs_of_attention_only(frozen, kernels_only):
    inputs = attention_inputs(1, 4, 2, 70, 16)
    every = gradients(attention, inputs)[1]
    some = [t.detach() if i in frozen else t for i, t in enumerate(inputs)]
    found = gradients(attention, some)[1]
    assert all(
        torch.equal(a, b) for a, b in zip(found, (g for i, g in enumerate(every) if i not in frozen), strict=True)
    )


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {"causal": True}),  # more keys than queries
        (((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {"causal": False}),
        (((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {"causal": True, "mask": torch.ones(5, 5, dtype=torch.bool)}),
        (((1, 2, 5, 264), (1, 2, 5, 264), (1, 2, 5, 264)), {"causal": True}),  # too wide
    ],
    ids=["after others", "both ways", "mask", "wide"],
)
def test_unsupported_attention_is_left_to_torch(shapes, options, monkeypatch):
    inputs = [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]
    monkeypatch.setattr(causal, "attention", lambda *arguments: pytest.fail("the kernels compute something else"))
    ours = gradients(lambda *t: ops.attention(*t, **options), inputs)
    expected = gradients(lambda *t: ops.attention(*t, **options, backend="reference"), inputs)
    assert error(ours[0], expected[0]) < 2e-6
    assert all(error(a, b) < 5e-6 for a, b in zip(ours[1], expected[1], strict=True))


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 5, 8), (1, 2, 4, 8), (1, 2, 5, 8)),  # as many values as there are no keys
        ((2, 2, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8)),
        ((1, 2, 5, 8), (1, 2, 5, 16), (1, 2, 5, 16)),
        ((1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
    ],
    ids=["tokens", "batch", "head dim", "heads"],
)
@pytest.mark.parametrize("products", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_mismatched_heads_are_refused(shapes, products):
    """The kernels would read and write out of bounds."""
    with pytest.raises((RuntimeError, ValueError), match="size|shape|heads"):
        ops.attention(*(leaf(*shape) for shape in shapes), causal=True, products=products)


def test_experts_without_rows_have_zero_gradients():
    inputs = moe_inputs(5, 6, 2, 16, 8)
    inputs[2] = torch.tensor([[1, 4]]).expand(5, -1)
    _, (_, _, grad_gate_up, grad_down) = gradients(moe, inputs)
    for e in (0, 2, 3, 5):
        assert not grad_gate_up[e].any()
        assert not grad_down[e].any()


@pytest.mark.parametrize("frozen", [(0,), (1,), (3, 4), (0, 1), (0, 1, 3)], ids=str)
def test_gradients_of_some_inputs_only(frozen, kernels_only):
    inputs = moe_inputs(20, 6, 2, 16, 8)
    every = dict(zip((0, 1, 3, 4), gradients(moe, inputs)[1], strict=True))
    some = [t.detach() if i in frozen else t for i, t in enumerate(inputs)]
    wanted = [i for i in every if i not in frozen]
    for i, mine in zip(wanted, gradients(moe, some)[1], strict=True):
        assert torch.equal(mine, every[i])


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_threads(name, isa, team, set_threads):
    if isa == "scalar":
        pytest.skip("left to torch")
    function, make = CALLS[name]
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(gradients(function, make()))
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_torchs_fallback_gives_the_same_results(name, monkeypatch):
    function, make = CALLS[name]
    ours = gradients(function, make())
    monkeypatch.setattr(training, "takes", lambda *tensors, **indices: False)
    theirs = gradients(function, make())
    assert error(ours[0], theirs[0]) < 2e-6
    assert all(error(a, b) < 5e-6 for a, b in zip(ours[1], theirs[1], strict=True))


def kept_bytes(e, k, f):
    """Bytes that a mixture of 512 tokens saves for backward besides its parameters."""
    inputs = moe_inputs(512, e, k, 128, f)
    kept: dict[int, int] = {}

    def keep(t):
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe(*inputs).sum().backward()
    for parameter in inputs[3:]:
        del kept[parameter.data_ptr()]
    ids_and_weights = sum(kept.pop(t.data_ptr()) for t in inputs[1:3])
    return sum(kept.values()), ids_and_weights


def test_saved_memory_does_not_grow_with_experts_per_token():
    """2 experts of width 256 against 8 of width 64: only the choices themselves take more."""
    few, many = kept_bytes(16, 2, 256), kept_bytes(64, 8, 64)
    rows, units = 512 * 128 * 4, 512 * 2 * 512 * 4
    assert few[0] == many[0] == rows + units
    assert many[1] == 512 * 8 * (4 + 8)


def test_labels_and_experts_out_of_range_are_refused():
    inputs = moe_inputs(5, 6, 2, 16, 8)
    for wrong in (-1, 6):
        inputs[2] = torch.full((5, 2), wrong)
        with pytest.raises(IndexError, match="are not all below 6"):
            moe(*inputs)
    for wrong in (-1, 12):
        with pytest.raises(IndexError, match="are not all below 12"):
            ops.linear_cross_entropy(leaf(3, 16), leaf(12, 16), torch.tensor([0, wrong, 3]))


def test_unsupported_calls_are_left_to_torch():
    x, weight = leaf(4, 16), leaf(8, 16)
    assert training.takes(x, weight, None)
    assert not training.takes(x.detach(), weight.detach())  # no gradients requested
    assert not training.takes(x, weight.detach().double())
    assert not training.takes(x[:0], weight)
    assert not training.takes(x, weight.to("meta"))
    assert not training.takes(x.as_subclass(type("Mine", (torch.Tensor,), {})), weight)
    with torch.no_grad():
        assert not training.takes(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", [(4, 32), (8, 16)]),  # inputs for twice as many rows
        ("linear", [(4, 16), (8, 16), (6,)]),
        ("linear", [(4, 16), (16,), (8,)]),
        ("rms_norm", [(4, 32), (16,)]),
        ("apply_rope", [(3, 4, 8), (3, 3), (3, 3)]),
        ("apply_rope", [(3, 4, 7), (3, 3), (3, 3)]),
        ("apply_rope", [(3, 4, 8), (5, 4), (5, 4)]),
    ],
)
def test_mismatched_shapes_are_refused(name, shapes):
    """The kernels would read and write out of bounds."""
    x, *others = (torch.zeros(shape) for shape in shapes)
    arguments = [x.requires_grad_(), *others, *([1e-5] if name == "rms_norm" else [])]
    with pytest.raises(RuntimeError, match="shape|size|matrix"):
        getattr(ops, name)(*arguments)


def test_rope_tables_may_have_more_dimensions_than_inputs():
    x, cos, sin = leaf(3, 4, 8), random(2, 3, 4, seed=1), random(2, 3, 4, seed=2)
    ours = gradients(ops.apply_rope, [x, cos, sin])
    expected = gradients(torch_fast._apply_rope, [x, cos, sin])
    assert ours[0].shape == (2, 3, 4, 8)
    assert torch.allclose(ours[0], expected[0])
    assert torch.allclose(ours[1][0], expected[1][0])


def test_the_loss_without_labels_is_zero():
    x, weight = leaf(5, 16), leaf(12, 16)
    loss, grads = gradients(ops.linear_cross_entropy, [x, weight, torch.full((5,), -100)])
    assert loss == 0
    assert not any(g.any() for g in grads)


def test_cross_entropy_of_logits_far_apart():
    """The largest logit is far above the others, which vanish, and far below those of other tokens."""
    x, weight = leaf(40, 16, scale=30.0), leaf(70, 16, seed=1, scale=3.0)
    labels = torch.arange(40)
    ours = gradients(ops.linear_cross_entropy, [x, weight, labels])
    logits = doubled([x])[0] @ doubled([weight])[0].T
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(ours[0].double(), expected, rtol=1e-6)
    assert all(torch.isfinite(g).all() for g in ours[1])
