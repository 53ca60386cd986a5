"""Metrics of routing against loops that are written to be read, and against what must hold for any trace."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest

from olmoe.analysis import metrics

N, L, K, E, V = 300, 3, 4, 9, 20


@pytest.fixture
def random():
    return np.random.default_rng(0)


def trace(random, tokens=N, experts=E) -> np.ndarray:
    """Distinct experts of each token and layer, the lower ones likelier."""
    noise = random.gumbel(size=(tokens, L, experts)) - 0.3 * np.arange(experts)
    return np.argsort(-noise, axis=2)[:, :, :K].astype(np.uint8)


@pytest.fixture
def ids(random):
    return trace(random)


@pytest.fixture(params=["whole", "in parts"])
def part(request, monkeypatch):
    if request.param == "in parts":
        monkeypatch.setattr(metrics, "_PART", 7)


@pytest.mark.usefixtures("part")
class TestAgainstLoops:
    @pytest.mark.parametrize("top", [None, 1, 2])
    def test_load(self, ids, top):
        found = metrics.load(ids, E, top)
        for layer in range(L):
            for expert in range(E):
                chosen = sum(expert in token[layer][:top] for token in ids.tolist())
                assert found[layer, expert] == pytest.approx(chosen / N)

    @pytest.mark.parametrize("top", [None, 1])
    def test_saturation(self, random, ids, top):
        final = trace(random)
        final[::3] = ids[::3]
        found = metrics.saturation(ids, final, top)
        for layer in range(L):
            common = [
                len(set(a[layer][:top]) & set(b[layer][:top]))
                for a, b in zip(ids.tolist(), final.tolist(), strict=True)
            ]
            assert found[layer] == pytest.approx(sum(common) / N / (top or K))

    @pytest.mark.parametrize("mode", ["pairs", "adjacent"])
    def test_coactivation(self, ids, mode):
        found = metrics.coactivation(ids, E, mode)
        for layer in range(L):
            pairs, alone = Counter(), Counter()
            for token in ids[:, layer].tolist():
                alone.update(token)
                if mode == "pairs":
                    pairs.update(permutations(token, 2))
                else:
                    for a, b in pairwise(token):
                        pairs.update([(a, b), (b, a)])
            for i in range(E):
                for j in range(E):
                    assert found[layer, i, j] == pytest.approx(pairs[i, j] / max(alone[i], 1))

    @pytest.mark.parametrize(("mode", "top"), [("pairs", 1), ("pairs", 3), ("ranks", 3)])
    def test_flow(self, ids, mode, top):
        found, expected = metrics.flow(ids, 0, 2, E, mode, top), Counter()
        for token in ids.tolist():
            for a, one in enumerate(token[0][:top]):
                for b, other in enumerate(token[2][:top]):
                    if mode == "pairs" or a == b:
                        expected[one, other] += 1
        assert {(i, j): n for (i, j), n in np.ndenumerate(found) if n} == dict(expected)

    @pytest.mark.parametrize("top", [None, 1])
    def test_vocabulary(self, random, ids, top):
        tokens = random.integers(0, V, N)
        tokens[::11] = -1
        found = metrics.vocabulary(ids, tokens, 1, E, top)
        best = []
        for at, token_id in enumerate(found.ids.tolist()):
            rows = [row for row in range(N) if tokens[row] == token_id]
            assert found.total[at] == len(rows)
            share = [sum(e in ids[row, 1, :top] for row in rows) / len(rows) for e in range(E)]
            assert found.share[at].tolist() == pytest.approx(share)
            best.append((max(share), share.index(max(share))))
        assert found.mean_of_best == pytest.approx(np.mean([b for b, _ in best]))
        for expert, value in enumerate(found.of_experts()):
            own = [b for b, e in best if e == expert]
            assert value == pytest.approx(np.mean(own)) if own else np.isnan(value)

    def test_neighbours(self, ids):
        starts = [0, 10, 50, 51]
        pairs = [(i - 1, i) for i in range(1, N) if i not in starts]
        for layer, found in enumerate(metrics.neighbour_overlap(ids, np.array(starts))):
            common = [len(set(ids[a, layer].tolist()) & set(ids[b, layer].tolist())) for a, b in pairs]
            assert found == pytest.approx(sum(common) / len(pairs) / K)

    def test_confidence(self, random):
        weights = -np.sort(-random.dirichlet(np.ones(E), (N, L)), axis=2)[:, :, :K]
        found = metrics.confidence(weights, bins=5)
        for layer in range(L):
            rows = weights[:, layer].tolist()
            assert found.first[layer] == pytest.approx(sum(row[0] for row in rows) / N)
            assert found.margin[layer] == pytest.approx(sum(row[0] - row[1] for row in rows) / N)
            assert found.mass[layer] == pytest.approx(sum(map(sum, rows)) / N)
            assert found.histogram[layer].tolist() == [
                sum(b / 5 <= row[0] < (b + 1) / 5 or (b == 4 and row[0] == 1) for row in rows) for b in range(5)
            ]


def test_shares_sum_to_k(ids):
    np.testing.assert_allclose(metrics.load(ids, E).sum(axis=1), K)
    np.testing.assert_allclose(metrics.load(ids, E, 1).sum(axis=1), 1)
    np.testing.assert_allclose(metrics.coactivation(ids, E).sum(axis=2)[metrics.load(ids, E) > 0], K - 1)


def test_permuted_experts_permute_the_results(random, ids):
    new = random.permutation(E).astype(np.uint8)
    moved = new[ids]
    np.testing.assert_array_equal(metrics.load(moved, E)[:, new], metrics.load(ids, E))
    one, other = metrics.coactivation(ids, E), metrics.coactivation(moved, E)
    np.testing.assert_array_equal(other[:, new][:, :, new], one)
    tokens = random.integers(0, V, N)
    a, b = metrics.vocabulary(ids, tokens, 0, E), metrics.vocabulary(moved, tokens, 0, E)
    np.testing.assert_array_equal(b.share[:, new], a.share)
    np.testing.assert_allclose(metrics.saturation(moved, moved), 1)


def test_balance():
    even = metrics.balance(np.full((1, 8), 0.25))
    assert (even.entropy[0], even.max_over_mean[0], even.dead[0]) == (pytest.approx(1), pytest.approx(1), 0)
    one = metrics.balance(np.eye(8)[:1])
    assert (one.entropy[0], one.max_over_mean[0], one.dead[0]) == (0, 8, 7)
    nothing = metrics.balance(np.zeros((1, 8)))
    assert (nothing.entropy[0], nothing.dead[0]) == (0, 8)


def test_chance_is_what_the_paper_says():
    """12.5 % and 1.6 % of saturation, 11.1 % and 2.8 % of co-activation for 8 of 64 experts at random (App. G)."""
    random = np.random.default_rng(1)
    a, b = (np.argsort(random.random((4000, 1, 64)), axis=2)[:, :, :8] for _ in range(2))
    assert metrics.saturation(a, b)[0] == pytest.approx(0.125, abs=0.005)
    assert metrics.saturation(a, b, 1)[0] == pytest.approx(0.0156, abs=0.006)
    off = ~np.eye(64, dtype=bool)
    assert metrics.coactivation(a, 64)[0][off].mean() == pytest.approx(7 / 63, abs=0.002)
    assert metrics.coactivation(a, 64, "adjacent")[0][off].mean() == pytest.approx(0.0278, abs=0.001)


def test_experts_that_a_policy_left_out_do_not_count(ids):
    fewer = ids.astype(np.int16)
    fewer[:, :, 2:] = -1
    np.testing.assert_array_equal(metrics.load(fewer, E), metrics.load(ids, E, 2))
    np.testing.assert_allclose(metrics.saturation(ids, fewer), 1)  # of the two that are left, both are there
    np.testing.assert_allclose(metrics.coactivation(fewer, E).sum(axis=2)[metrics.load(fewer, E) > 0], 1)
    np.testing.assert_array_equal(metrics.flow(fewer, 0, 1, E, top=4), metrics.flow(ids, 0, 1, E, top=2))
    stored = fewer.astype(np.uint8)  # -1 is 255
    np.testing.assert_array_equal(metrics.load(stored, E), metrics.load(fewer, E))
    np.testing.assert_allclose(metrics.saturation(ids, stored), 1)


def test_what_takes_most_of_an_id():
    ids = np.array([[[0]], [[0]], [[1]], [[0]], [[2]]])
    found = metrics.vocabulary(ids, np.array([5, 5, 5, 7, 8]), 0, 3)
    assert found.top_ids(0, 5) == [(7, 1.0), (5, pytest.approx(2 / 3))]
    assert found.top_ids(0, 5, least=2) == [(5, pytest.approx(2 / 3))]
    assert found.top_ids(0, 1) == [(7, 1.0)]


def test_next_ids_stay_within_documents():
    assert metrics.next_ids(np.array([4, 5, 6, 7])).tolist() == [5, 6, 7, -1]
    assert metrics.next_ids(np.array([4, 5, 6, 7]), np.array([0, 2])).tolist() == [5, -1, 7, -1]


def test_nothing_is_nothing():
    none = np.zeros((0, L, K), dtype=np.uint8)
    assert metrics.load(none, E).sum() == 0
    assert metrics.saturation(none, none).tolist() == [0] * L
    assert metrics.vocabulary(none, np.zeros(0, dtype=int), 0, E).mean_of_best == 0


def test_wrong_requests_are_named(random, ids):
    with pytest.raises(ValueError, match="top must be from 1 to 4"):
        metrics.load(ids, E, 5)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.saturation(ids, ids[1:])
