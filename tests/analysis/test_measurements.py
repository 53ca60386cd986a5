"""metrics.json: what the schema promises, from a trace of two domains that use different experts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from olmoe.analysis import metrics
from olmoe.analysis.measurements import agreement, domains_of, measure
from olmoe.analysis.trace import Trace, TraceWriter

L, K, E = 3, 2, 6


@pytest.fixture
def trace(tmp_path) -> Trace:
    random = np.random.default_rng(0)
    domains = json.dumps([["even", 0, 100], ["odd", 100, 250]])
    with TraceWriter(
        tmp_path / "t", layers=L, experts=E, top_k=K, predictions=True, metadata={"domains": domains, "model": "m"}
    ) as writer:
        for name, tokens in (("even", 100), ("odd", 150)):
            chosen = np.argsort(random.random((tokens, L, E // 2)), axis=2)[:, :, :K] * 2 + (name == "odd")
            weights = -np.sort(-random.dirichlet(np.ones(E), (tokens, L)), axis=2)[:, :, :K]
            writer.start()
            ids = random.integers(0, 30, tokens)
            writer.append(chosen, weights, ids.tolist(), ids + 1)
    return Trace.open(tmp_path / "t")


@pytest.fixture
def long_trace(tmp_path) -> Trace:
    """More than a part of the usual size, with tokens that chose fewer experts."""
    random = np.random.default_rng(1)
    tokens = metrics._PART * 2 + 100
    domains = json.dumps([["a", 0, 5000], ["b", 5000, tokens]])
    with TraceWriter(
        tmp_path / "long", layers=L, experts=E, top_k=K, predictions=True, metadata={"domains": domains}
    ) as writer:
        chosen = np.argsort(random.random((tokens, L, E)), axis=2)[:, :, :K].astype(np.int16)
        chosen[::50, :, 1:] = -1
        weights = -np.sort(-random.dirichlet(np.ones(E), (tokens, L)), axis=2)[:, :, :K]
        ids = random.zipf(1.3, tokens) % 500
        for start in range(0, tokens, 777):
            part = slice(start, start + 777)
            writer.start()
            writer.append(chosen[part], weights[part], ids[part], ids[part] * 7 % 500)
    return Trace.open(tmp_path / "long")


def test_numbers_do_not_depend_on_parts(long_trace, monkeypatch):
    """All numbers are the same to 1e-12, whether a trace is read in parts or as a whole, from a file or from memory."""
    whole = {
        name: np.array(getattr(long_trace, name)) for name in ("expert_ids", "weights", "input_ids", "predicted_ids")
    }
    found = []
    for trace in (long_trace, replace(long_trace, **whole)):
        for part, vocabulary_parts in ((1 << 14, 16), (1 << 30, 1), (1000, 3)):
            monkeypatch.setattr(metrics, "_PART", part)
            monkeypatch.setattr(metrics, "_VOCABULARY_PARTS", vocabulary_parts)
            found.append(list(numbers_of(measure(trace))))
    for other in found[1:]:
        assert [place for place, _ in other] == [place for place, _ in found[0]]
        np.testing.assert_allclose([n for _, n in other], [n for _, n in found[0]], rtol=1e-12, atol=1e-15)


def numbers_of(found, place=()):
    """Every number of metrics.json, with its place."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from numbers_of(value, (*place, key))
    elif isinstance(found, int | float):
        yield place, found


def test_domains_and_their_experts(trace):
    found = json.loads(json.dumps(measure(trace), allow_nan=False))
    assert domains_of(trace) == {"even": slice(0, 100), "odd": slice(100, 250)}
    assert [d["tokens"] for d in found["domains"].values()] == [100, 150]
    for offset, name in enumerate(("even", "odd")):
        for layer in range(L):
            numbers = found["domains"][name]["layers"][str(layer)]
            assert (len(numbers["top_k"]), sum(numbers["top_k"])) == (E, pytest.approx(K))
            assert sum(numbers["top_1"]) == pytest.approx(1)
            assert all(share == 0 for share in numbers["top_k"][1 - offset :: 2])
            assert numbers["dead"] == E // 2
    # Of 250 tokens 150 are odd: what the even ones choose is at a distance of that share.
    assert found["domains"]["even"]["layers"]["0"]["distance"] == pytest.approx(0.6, abs=0.1)


def test_layers_of_all_domains(trace):
    found = measure(trace)
    assert (found["schema"], found["model"], found["tokens"], found["top_k"]) == ("olmoe-metrics-1", "m", 250, K)
    for layer in range(L):
        numbers = found["layers"][str(layer)]
        assert numbers["dead"] == 0
        assert 0 < numbers["margin"] < numbers["first"] < numbers["mass"] < 1
        assert sum(numbers["histogram"]) == 250
        assert all(i % 2 == j % 2 for i, j, _ in numbers["coactivation"])  # within a domain alone
        for which in ("input", "predicted", "next"):
            assert 1 / E < numbers["vocabulary"][which]["top_1"] <= numbers["vocabulary"][which]["top_k"] <= 1
        assert numbers["vocabulary"]["input"] == numbers["vocabulary"]["predicted"]  # which are the same but for 1
        assert len(numbers["vocabulary"]["experts"]) == E
    assert list(found["flow"]) == ["0-1", "1-2"]
    assert sum(n for _, _, n in found["flow"]["0-1"]) == 250
    assert found["chance"]["coactivation"] == pytest.approx(1 / 5)


def test_agreement_of_two_models(trace):
    assert agreement(trace, trace) == {name: {"top_k": [1] * L, "top_1": [1] * L} for name in ("even", "odd")}
    moved = Trace(trace.expert_ids[::-1], trace.weights, trace.input_ids, trace.starts, None, trace.metadata)
    assert max(agreement(trace, moved)["even"]["top_k"]) == 0
    other = Trace(trace.expert_ids, trace.weights, trace.input_ids[::-1], trace.starts, None, trace.metadata)
    with pytest.raises(ValueError, match="different tokens"):
        agreement(trace, other)


def test_the_map_of_experts_chosen_together(trace):
    for numbers in measure(trace)["layers"].values():
        experts, shares = numbers["together"]["experts"], np.asarray(numbers["together"]["shares"])
        assert sorted(experts) == list(range(E))
        i, j, share = numbers["coactivation"][0]
        assert shares[experts.index(i), experts.index(j)] == share == shares.max()
        assert {experts[0], experts[1]} == {i, j}
        assert numbers["often_together"] == (shares > 0.5).sum()
        assert np.diag(shares).tolist() == [0] * E
