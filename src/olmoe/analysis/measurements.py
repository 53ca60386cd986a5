"""From a trace to numbers: what `olmoe analyze` writes as metrics.json.

The schema ("olmoe-metrics-1"; lists over experts have one number per expert, keys of layers are their numbers):

    model, layers_count, experts, top_k, tokens
    accuracy                          share of next ids that were predicted; null without predictions
    domains.NAME.tokens
    domains.NAME.layers.L.top_k       share of tokens that choose each expert (Eq. 7); sums to top_k
    domains.NAME.layers.L.top_1       the same for first choices; sums to 1
    domains.NAME.layers.L.{entropy, max_over_mean, dead}     how evenly experts are used
    domains.NAME.layers.L.distance    how far the domain's first choices are from those of all (total variation)
    layers.L.top_k, top_1, entropy, max_over_mean, dead      for all domains together
    layers.L.{first, margin, mass}    mean probability of the first expert, its lead over the second, and of all chosen
    layers.L.{ranks, histogram}       mean probability by rank; tokens by the first one's, in 20 equal steps from 0 to 1
    layers.L.neighbours               share of experts that the token before chose too
    layers.L.coactivation             experts chosen together most often: [i, j, share of i's tokens] (Eq. 6)
    layers.L.often_together           pairs i, j of which more than half of i's tokens choose j as well
    layers.L.together.{experts, shares}   those of the strongest pairs, and of each pair of them the same share
    layers.L.vocabulary.{input, predicted, next}.{top_k, top_1}    mean best share of an id (Eq. 8, Fig. 30)
    layers.L.vocabulary.experts       for each expert, on input ids by first choices (Fig. 23); null for none
    layers.L.vocabulary.experts_predicted   the same for predicted ids
    flow.{"A-B"}                      tokens by first choices in layers A and B, the largest: [i, j, tokens] (Fig. 35)
    chance.{saturation_k, saturation_1, coactivation}        what routing at random would give
    against.model, against.domains.NAME.{top_k, top_1}   agreement with another model by layer (Eq. 5), if given
    against.shares.NAME.L.{top_k, top_1}    the other model's shares of tokens, as in domains (Fig. 33)
    top_tokens                        what experts of a layer take most exclusively: {layer, least, experts.E: [[text,
                                      share of its occurrences, occurrences]]} (Table 8)
    token_shares.{layer, least, experts.E.NAME}   of the last layer, by domain: ids by the share of their occurrences
                                      that choose the expert, in 10 steps; of ids that it took `least` times (Fig. 32)
    revisions                         earlier checkpoints on the same tokens, where any were given: a list by training
                                      step of {name, step (or null), accuracy, layers, domains}
    revisions.I.layers.L.{saturation_k, saturation_1}    share of the model's experts that are chosen already (Eq. 5)
    revisions.I.layers.L.{entropy, max_over_mean, dead, first, margin, mass, neighbours}    as in layers
    revisions.I.domains.NAME.{top_k, top_1, distance}    of each layer: saturation within the domain, and as in domains

Shapes legend: N tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from olmoe.analysis import metrics
from olmoe.analysis.trace import Trace

SCHEMA = "olmoe-metrics-1"
# How many pairs and flows of a layer are listed, those with the highest values.
_LISTED = 32
# Experts in the map of those chosen together, as in the paper's script.
_TOGETHER = 16
# Ids that an expert took less often say little about it (as in the paper's script).
_TAKEN = 8


def domains_of(trace: Trace) -> dict[str, slice]:
    """Which tokens of a trace belong to which domain, by name."""
    listed = json.loads(trace.metadata.get("domains", "[]"))
    return {name: slice(start, end) for name, start, end in listed} or {"all": slice(0, len(trace))}


def measure(trace: Trace) -> dict[str, Any]:
    """All numbers of one trace, by the schema above."""
    _, layers, k = trace.expert_ids.shape
    domains, experts = domains_of(trace), trace.experts
    loads = {
        name: (metrics.load(trace.expert_ids[part], experts), metrics.load(trace.expert_ids[part], experts, 1))
        for name, part in domains.items()
    }
    every = (metrics.load(trace.expert_ids, experts), metrics.load(trace.expert_ids, experts, 1))
    return {
        "schema": SCHEMA,
        "model": trace.metadata.get("model", ""),
        "layers_count": layers,
        "experts": experts,
        "top_k": k,
        "tokens": len(trace),
        "accuracy": accuracy(trace),
        "domains": {
            name: {
                "tokens": part.stop - part.start,
                "layers": _loads(*loads[name], every[1]),
            }
            for name, part in domains.items()
        },
        "layers": _layers(trace, *every),
        "flow": _flows(trace),
        "token_shares": _token_shares(trace, domains),
        "chance": {
            "saturation_k": k / experts,
            "saturation_1": 1 / experts,
            "coactivation": (k - 1) / (experts - 1) if experts > 1 else 0.0,
        },
    }


def agreement(trace: Trace, other: Trace) -> dict[str, Any]:
    """How far two models agree on the same tokens: by domain, the share of experts in common in each layer."""
    if not np.array_equal(trace.input_ids, other.input_ids):
        raise ValueError("the traces are of different tokens")
    return {
        name: {
            "top_k": metrics.saturation(other.expert_ids[part], trace.expert_ids[part]).tolist(),
            "top_1": metrics.saturation(other.expert_ids[part], trace.expert_ids[part], 1).tolist(),
        }
        for name, part in domains_of(trace).items()
    }


def shares(trace: Trace) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By domain and layer, the share of tokens that choose each expert (Eq. 7), and choose it first."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, part in domains_of(trace).items():
        top_k, top_1 = (metrics.load(trace.expert_ids[part], trace.experts, top) for top in (None, 1))
        found[name] = {
            str(layer): {"top_k": top_k[layer].tolist(), "top_1": top_1[layer].tolist()} for layer in range(len(top_k))
        }
    return found


def accuracy(trace: Trace) -> float | None:
    """The share of next ids that the model predicted, within windows; None if predictions were not recorded."""
    if trace.predicted_ids is None:
        return None
    following = metrics.next_ids(trace.input_ids, trace.starts)
    known = following >= 0
    return float((np.asarray(trace.predicted_ids)[known] == following[known]).mean()) if known.any() else None


def measure_revision(trace: Trace, final: Trace) -> dict[str, Any]:
    """How far an earlier checkpoint has got on the tokens of `final`, by the schema's `revisions`."""
    experts = trace.experts
    balance = metrics.balance(metrics.load(trace.expert_ids, experts))
    confidence = metrics.confidence(trace.weights)
    by_layer: dict[str, npt.NDArray[Any]] = {
        "saturation_k": metrics.saturation(trace.expert_ids, final.expert_ids),
        "saturation_1": metrics.saturation(trace.expert_ids, final.expert_ids, 1),
        **balance._asdict(),
        **{name: getattr(confidence, name) for name in ("first", "margin", "mass")},
        "neighbours": metrics.neighbour_overlap(trace.expert_ids, trace.starts),
    }
    first = metrics.load(trace.expert_ids, experts, 1)
    domains = agreement(final, trace)
    for name, part in domains_of(trace).items():
        domains[name]["distance"] = metrics.distance(metrics.load(trace.expert_ids[part], experts, 1), first).tolist()
    return {
        "accuracy": accuracy(trace),
        "layers": {
            str(layer): {name: values[layer].item() for name, values in by_layer.items()} for layer in range(len(first))
        },
        "domains": domains,
    }


def _loads(
    top_k_LE: npt.NDArray[np.float64], top_1_LE: npt.NDArray[np.float64], every_LE: npt.NDArray[np.float64] | None
) -> dict[str, dict[str, Any]]:
    balance = metrics.balance(top_k_LE)
    apart = None if every_LE is None else metrics.distance(top_1_LE, every_LE)
    found: dict[str, dict[str, Any]] = {}
    for layer in range(len(top_k_LE)):
        found[str(layer)] = {
            "top_k": top_k_LE[layer].tolist(),
            "top_1": top_1_LE[layer].tolist(),
            "entropy": float(balance.entropy[layer]),
            "max_over_mean": float(balance.max_over_mean[layer]),
            "dead": int(balance.dead[layer]),
        }
        if apart is not None:
            found[str(layer)]["distance"] = float(apart[layer])
    return found


def _layers(
    trace: Trace, top_k_LE: npt.NDArray[np.float64], top_1_LE: npt.NDArray[np.float64]
) -> dict[str, dict[str, Any]]:
    found = _loads(top_k_LE, top_1_LE, None)
    confidence = metrics.confidence(trace.weights)
    neighbours = metrics.neighbour_overlap(trace.expert_ids, trace.starts)
    together = metrics.coactivation(trace.expert_ids, trace.experts)
    tokens = {
        "input": metrics.occurrences(trace.input_ids),
        "next": metrics.occurrences(metrics.next_ids(trace.input_ids, trace.starts)),
    }
    if trace.predicted_ids is not None:
        tokens["predicted"] = metrics.occurrences(trace.predicted_ids)
    for layer in range(len(top_k_LE)):
        numbers = found[str(layer)]
        numbers["first"] = float(confidence.first[layer])
        numbers["margin"] = float(confidence.margin[layer])
        numbers["mass"] = float(confidence.mass[layer])
        numbers["ranks"] = confidence.ranks[layer].tolist()
        numbers["histogram"] = confidence.histogram[layer].tolist()
        numbers["neighbours"] = float(neighbours[layer])
        numbers["coactivation"] = [[i, j, float(together[layer, i, j])] for i, j in _largest(together[layer])]
        numbers["often_together"] = int((together[layer] > 0.5).sum())
        numbers["together"] = _together(together[layer])
        follows = metrics.vocabularies(trace.expert_ids, tokens, layer, trace.experts, (None, 1))
        numbers["vocabulary"] = {
            name: {"top_k": follows[name, None].mean_of_best, "top_1": follows[name, 1].mean_of_best}
            for name in ("input", "predicted", "next")
            if name in tokens
        }
        for key, name in (("experts", "input"), ("experts_predicted", "predicted")):
            if name in tokens:
                favourites = follows[name, 1].of_experts()
                numbers["vocabulary"][key] = [None if math.isnan(x) else float(x) for x in favourites]
    return found


def _token_shares(trace: Trace, domains: Mapping[str, slice]) -> dict[str, Any]:
    """How exclusively experts of the last layer take their ids in each domain; those that take none are left out."""
    layer = trace.expert_ids.shape[1] - 1
    experts: dict[str, dict[str, list[int]]] = {}
    for name, part in domains.items():
        found = metrics.vocabulary(trace.expert_ids[part], trace.input_ids[part], layer, trace.experts)
        for expert in range(trace.experts):
            counts = found.histogram(expert, least=_TAKEN)
            if counts.any():
                experts.setdefault(str(expert), {})[name] = counts.tolist()
    return {"layer": layer, "least": _TAKEN, "experts": dict(sorted(experts.items(), key=lambda item: int(item[0])))}


def _flows(trace: Trace) -> dict[str, list[list[int]]]:
    """The flows between the first, a middle and the last layer, as in the paper's figure."""
    layers = trace.expert_ids.shape[1]
    chosen = sorted({0, (layers - 1) // 2, layers - 1})
    found = {}
    for a, b in itertools.pairwise(chosen):
        flow = metrics.flow(trace.expert_ids, a, b, trace.experts)
        found[f"{a}-{b}"] = [[i, j, int(flow[i, j])] for i, j in _largest(flow)]
    return found


def _together(matrix: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The experts with the largest shares with any other, strongest first, and the shares among them."""
    strength = np.maximum(matrix.max(axis=0), matrix.max(axis=1))
    experts = [int(e) for e in np.argsort(-strength, kind="stable")[:_TOGETHER] if strength[e] > 0]
    return {"experts": experts, "shares": matrix[np.ix_(experts, experts)].tolist()}


def _largest(matrix: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """The indices of the largest values above 0, in falling order."""
    order = np.argsort(-matrix, axis=None, kind="stable")[:_LISTED]
    places = [divmod(int(at), matrix.shape[1]) for at in order]
    return [(i, j) for i, j in places if matrix[i, j] > 0]
