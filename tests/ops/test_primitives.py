"""What each mixture-of-experts primitive guarantees on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from olmoe import ops

pytestmark = pytest.mark.parametrize("backend", ["torch", "reference"])


def logits(n=40, e=16, seed=0):
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed))


def test_route_takes_the_largest_probabilities_in_descending_order(backend):
    weights, ids = ops.route(logits(), 5, backend=backend)
    probabilities = logits().softmax(-1)
    assert torch.equal(weights, weights.sort(dim=-1, descending=True)[0])
    assert torch.allclose(weights, probabilities.gather(1, ids))
    left_out = probabilities.scatter(1, ids, 0.0)
    assert (left_out.amax(-1) <= weights[:, -1]).all()
    assert all(len(set(row)) == 5 for row in ids.tolist())


def test_route_depends_on_each_token_alone(backend):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    weights, ids = ops.route(logits(), 4, backend=backend)
    permuted_weights, permuted_ids = ops.route(logits()[order], 4, backend=backend)
    assert torch.equal(permuted_weights, weights[order])
    assert torch.equal(permuted_ids, ids[order])


def test_route_computes_in_fp32_from_half_precision(backend):
    half = logits().bfloat16()
    weights, _ = ops.route(half, 4, backend=backend)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights, half.float().softmax(-1).topk(4)[0])


def test_sort_by_expert_is_a_stable_permutation_grouped_by_expert(backend):
    _, ids = ops.route(logits(), 4, backend=backend)
    rows = ops.sort_by_expert(ids, 16, backend=backend)
    flat = ids.flatten()
    assert sorted(rows.order_M.tolist()) == list(range(160))
    experts = flat[rows.order_M].tolist()
    assert experts == sorted(experts)
    for e in range(16):
        start, end = rows.offsets_E[e], rows.offsets_E[e + 1]
        assert end - start == (flat == e).sum()
        assert (flat[rows.order_M[start:end]] == e).all()
        tokens = rows.token_ids_M[start:end].tolist()
        assert tokens == sorted(tokens)
    assert torch.equal(rows.token_ids_M, rows.order_M // 4)
    assert torch.equal(rows.order_M[rows.position_NK].flatten(), torch.arange(160))


def test_combine_undoes_sort_by_expert(backend):
    """If all rows of a token are equal, the result is the row times the sum of the weights."""
    weights, ids = ops.route(logits(), 4, backend=backend)
    rows = ops.sort_by_expert(ids, 16, backend=backend)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    out = ops.combine(ops.gather_rows(x, rows, backend=backend), weights, rows, backend=backend)
    assert torch.allclose(out, x * weights.sum(-1, keepdim=True), atol=1e-6)


def test_experts_affect_only_their_own_rows(backend):
    """NaN weights of an expert that no token chose must not affect anything."""
    ids = torch.tensor([[0, 2], [2, 0], [0, 2]])
    gate_up, down = torch.randn(4, 8, 6), torch.randn(4, 6, 4)
    gate_up[1] = down[1] = gate_up[3] = down[3] = float("nan")
    out = ops.moe(torch.randn(3, 6), torch.ones(3, 2), ids, gate_up, down, F.silu, backend=backend)
    assert torch.isfinite(out).all()


def test_moe_does_not_drop_tokens_when_all_choose_one_expert(backend):
    ids = torch.zeros(500, 1, dtype=torch.long)
    x, gate_up, down = torch.randn(500, 8), torch.randn(4, 8, 8), torch.randn(4, 8, 4)
    out = ops.moe(x, torch.ones(500, 1), ids, gate_up, down, F.silu, backend=backend)
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    assert torch.allclose(out, (F.silu(gate) * up) @ down[0].T, atol=1e-4)
