"""Metrics of routing against loops that are written to be read, and against what must hold for any trace."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoe.analysis import metrics

COUNTS = Path(__file__).parents[1] / "data" / "olmoe-expert-counts.json"
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

    def test_ids_by_share(self, random, ids):
        tokens = random.integers(0, V, N)
        found = metrics.vocabulary(ids, tokens, 2, E)
        for expert in range(E):
            expected = [0] * 4
            for token_id in set(tokens.tolist()):
                rows = [row for row in range(N) if tokens[row] == token_id]
                taken = sum(expert in ids[row, 2] for row in rows)
                if taken >= 5:
                    expected[min(int(4 * taken / len(rows)), 3)] += 1
            assert found.histogram(expert, bins=4, least=5).tolist() == expected

    def test_distance(self, random, ids):
        other = trace(random)
        found = metrics.distance(metrics.load(ids, E), metrics.load(other, E, 2))
        for layer in range(L):
            apart = 0.0
            for expert in range(E):
                one = sum(expert in token for token in ids[:, layer].tolist()) / (N * K)
                apart += abs(one - sum(expert in token[:2] for token in other[:, layer].tolist()) / (N * 2))
            assert found[layer] == pytest.approx(apart / 2)

    def test_balance_of_a_trace(self, ids):
        found = metrics.balance(metrics.load(ids, E))
        for layer in range(L):
            chosen = Counter(expert for token in ids[:, layer].tolist() for expert in token)
            parts = [chosen[expert] / (N * K) for expert in range(E)]
            assert found.entropy[layer] == pytest.approx(-sum(p * np.log(p) for p in parts if p) / np.log(E))
            assert found.max_over_mean[layer] == pytest.approx(max(parts) * E)
            assert found.dead[layer] == parts.count(0)

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
            assert found.ranks[layer].tolist() == pytest.approx([sum(column) / N for column in zip(*rows, strict=True)])
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


# ---- what the paper says ----


def test_the_definitions_by_hand():
    """Four tokens that read a, b, a, b and choose two of three experts in two layers, early and at the end."""
    early = np.array([[[0, 1], [0, 1]], [[0, 1], [2, 0]], [[1, 0], [0, 1]], [[2, 1], [1, 2]]])
    final = np.array([[[0, 1], [1, 2]], [[0, 2], [2, 0]], [[0, 1], [0, 1]], [[1, 2], [1, 2]]])
    a, b = 7, 9
    ids = np.array([a, b, a, b])
    # Eq. 5: the means of 2/2, 1/2, 2/2, 2/2 and of 1/2, 2/2, 2/2, 2/2; of first choices 1, 1, 0, 0 and 0, 1, 1, 1.
    assert metrics.saturation(early, final).tolist() == [7 / 8, 7 / 8]
    assert metrics.saturation(early, final, 1).tolist() == [1 / 2, 3 / 4]
    # Eq. 6: of expert 0's three tokens in layer 0 two choose 1 as well, and one chooses 2.
    np.testing.assert_allclose(
        metrics.coactivation(final, 3)[0], [[0, 2 / 3, 1 / 3], [2 / 3, 0, 1 / 3], [1 / 2, 1 / 2, 0]]
    )
    # Eq. 7: all of domain "first two tokens" choose expert 0 in layer 0, half of them each other expert.
    assert metrics.load(final[:2], 3)[0].tolist() == [1, 1 / 2, 1 / 2]
    # Eq. 8: id a always goes to 0 and 1 in layer 0; b once to 0 and 1, twice to 2; first choices of b are 0 and 1.
    found = metrics.vocabulary(final, ids, 0, 3)
    assert found.share.tolist() == [[1, 1, 0], [1 / 2, 1 / 2, 1]]
    assert found.mean_of_best == 1
    assert metrics.vocabulary(final, ids, 0, 3, 1).mean_of_best == pytest.approx((1 + 1 / 2) / 2)
    # Fig. 35: first choices 0-1, 0-2, 0-0, 1-1.
    assert metrics.flow(final, 0, 1, 3).tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]


PUBLISHED = {  # % of tokens, the five busiest experts of layers 0, 7 and 15, from the released counts (Fig. 22)
    "top_k/arxiv": [
        {0: 97.7, 40: 31.4, 54: 23.4, 17: 22.5, 41: 20.0},
        {17: 78.5, 4: 73.5, 2: 55.3, 35: 51.6, 58: 49.5},
        {17: 93.7, 34: 51.3, 30: 48.3, 58: 41.7, 36: 39.0},
    ],
    "top_k/github": [
        {21: 62.6, 40: 30.3, 53: 25.2, 41: 22.6, 6: 19.9},
        {17: 77.0, 2: 75.6, 4: 65.7, 35: 57.4, 0: 38.8},
        {30: 56.4, 8: 56.2, 17: 55.0, 58: 47.2, 36: 46.0},
    ],
    "top_k/c4": [
        {41: 37.7, 9: 19.0, 58: 18.8, 57: 16.9, 11: 16.7},
        {1: 33.2, 18: 26.8, 46: 21.0, 25: 20.9, 5: 18.9},
        {7: 31.2, 21: 27.0, 25: 26.6, 26: 23.6, 2: 21.8},
    ],
    "top_1/arxiv": [{0: 51.6}, {4: 18.5, 58: 17.3, 17: 13.8}, {17: 57.3, 34: 13.8}],
    "top_1/wikipedia": [{11: 28.5}, {27: 51.9}, {57: 32.6, 63: 15.3}],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_domain_specialisation_of_the_released_model(name):
    """Tokens are made up so that experts are chosen as often as they were: shares must be the paper's."""
    counts, k = json.loads(COUNTS.read_text(encoding="utf-8"))[name], 8 if name.startswith("top_k") else 1
    tokens = sum(counts[0]) // k
    # Column by column, no token has an expert twice, because none was chosen more often than there are tokens.
    ids = np.stack([np.repeat(np.arange(64, dtype=np.uint8), row).reshape(k, tokens).T for row in counts], axis=1)
    found = metrics.load(ids, 64)
    assert tokens == 208_896
    for layer, busiest in enumerate(PUBLISHED[name]):
        order = np.argsort(-found[layer])[: len(busiest)]
        assert {int(e): round(100 * found[layer, e], 1) for e in order} == busiest
    if name == "top_k/c4":  # "more balanced"
        arxiv = np.asarray(json.loads(COUNTS.read_text(encoding="utf-8"))["top_k/arxiv"]) / tokens
        assert (metrics.balance(found).entropy > metrics.balance(arxiv).entropy).all()


# ---- what must hold for any trace ----


@st.composite
def traces(draw):
    """Distinct experts for each token of each layer; also how many experts there are."""
    experts = draw(st.integers(2, 9))
    k, layers, tokens = draw(st.integers(1, experts)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, experts - 1), min_size=k, max_size=k, unique=True)
    found = draw(st.lists(st.lists(rows, min_size=layers, max_size=layers), min_size=tokens, max_size=tokens))
    return np.array(found, dtype=np.uint8), experts


@settings(max_examples=60, deadline=None)
@given(traces(), st.data())
def test_properties_of_any_trace(made, data):
    ids, experts = made
    tokens, layers, k = ids.shape
    load = metrics.load(ids, experts)
    np.testing.assert_allclose(load.sum(axis=1), k)
    np.testing.assert_allclose(metrics.load(ids, experts, 1).sum(axis=1), 1)
    assert ((load >= 0) & (load <= 1)).all()
    balance = metrics.balance(load)
    assert ((balance.entropy >= 0) & (balance.entropy <= 1 + 1e-9)).all()
    assert ((balance.max_over_mean >= 1 - 1e-9) & (balance.dead <= experts - k)).all()
    np.testing.assert_allclose(metrics.saturation(ids, ids), 1)
    number, together = metrics.counts(ids, experts), metrics.coactivation(ids, experts)
    pairs = together * number[:, :, None]
    np.testing.assert_allclose(pairs, pairs.transpose(0, 2, 1), atol=1e-9)  # N_ij is N_ji
    np.testing.assert_allclose(pairs.sum(axis=(1, 2)), tokens * k * (k - 1), atol=1e-9)
    words = np.array(data.draw(st.lists(st.integers(0, 4), min_size=tokens, max_size=tokens)))
    for layer in range(layers):
        found = metrics.vocabulary(ids, words, layer, experts)
        np.testing.assert_allclose(found.share.sum(axis=1), k)
        np.testing.assert_allclose((found.share * found.total[:, None]).sum(axis=0), number[layer])
        assert metrics.flow(ids, 0, layer, experts).sum() == tokens
    # Tokens in another order have the same measures, but for what depends on order.
    order = np.array(data.draw(st.permutations(range(tokens))))
    np.testing.assert_allclose(metrics.coactivation(ids[order], experts), together)
    # Experts under other names have the same measures under those.
    new = np.array(data.draw(st.permutations(range(experts))), dtype=np.uint8)
    np.testing.assert_allclose(metrics.load(new[ids], experts)[:, new], load)
    np.testing.assert_allclose(metrics.coactivation(new[ids], experts)[:, new][:, :, new], together)
    np.testing.assert_allclose(metrics.neighbour_overlap(new[ids]), metrics.neighbour_overlap(ids))
    np.testing.assert_array_equal(metrics.flow(new[ids], 0, 0, experts)[new][:, new], metrics.flow(ids, 0, 0, experts))
    moved = metrics.balance(metrics.load(new[ids], experts))
    for one, other in zip(balance, moved, strict=True):
        np.testing.assert_allclose(one, other)


def test_balance():
    even = metrics.balance(np.full((1, 8), 0.25))
    assert (even.entropy[0], even.max_over_mean[0], even.dead[0]) == (pytest.approx(1), pytest.approx(1), 0)
    one = metrics.balance(np.eye(8)[:1])
    assert (one.entropy[0], one.max_over_mean[0], one.dead[0]) == (0, 8, 7)
    assert str(one.entropy[0]) == "0.0"  # not below it
    assert metrics.balance(np.ones((1, 1))).entropy[0] == 1  # a single expert cannot be uneven
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


def test_an_id_can_be_listed_for_its_favourite_alone():
    ids = np.array([[[0]], [[0]], [[1]], [[1]]])
    found = metrics.vocabulary(ids, np.array([5, 5, 5, 7]), 0, 2)
    assert found.top_ids(1, 5) == [(7, 1.0), (5, pytest.approx(1 / 3))]
    assert found.top_ids(1, 5, mode="favourite") == [(7, 1.0)]
    assert found.top_ids(0, 5, mode="favourite") == [(5, pytest.approx(2 / 3))]


def test_next_ids_stay_within_documents():
    assert metrics.next_ids(np.array([4, 5, 6, 7])).tolist() == [5, 6, 7, -1]
    assert metrics.next_ids(np.array([4, 5, 6, 7]), np.array([0, 2])).tolist() == [5, -1, 7, -1]


def test_empty_inputs_give_empty_outputs():
    none = np.zeros((0, L, K), dtype=np.uint8)
    assert metrics.load(none, E).sum() == 0
    assert metrics.saturation(none, none).tolist() == [0] * L
    assert metrics.vocabulary(none, np.zeros(0, dtype=int), 0, E).mean_of_best == 0


def test_wrong_requests_are_named(random, ids):
    with pytest.raises(ValueError, match="top must be from 1 to 4"):
        metrics.load(ids, E, 5)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.saturation(ids, ids[1:])
