"""What routing looks like: pure functions on arrays of chosen experts, numpy in and out.

Every function takes what tokens chose as `expert_ids` (N, L, K), by falling probability, -1 where a token chose fewer
(the largest value in unsigned arrays, such as in traces).
With `top=1` only the first of them counts, as in half of the paper's figures ("OLMoE: Open Mixture-of-Experts Language
Models", Muennighoff et al. 2024, section 5). Where the published scripts compute something other than the paper's
equation, that is a named mode.

Shapes legend: N tokens, L layers, K experts per token, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from olmoe.io.mapped import forget

Ids = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

# Tokens processed at a time: few, so that intermediate results and what is read of a mapped array stay small; more
# where each part costs a pass over the vocabulary.
_PART, _VOCABULARY_PARTS = 1 << 14, 16


# ---- load and balance ----


def counts(expert_ids: Ids, experts: int, top: int | None = None) -> npt.NDArray[np.int64]:
    """How often each expert was chosen: (N, L, K) -> (L, E)."""
    layers = expert_ids.shape[1]
    found = np.zeros(layers * experts, dtype=np.int64)
    offsets = np.arange(layers, dtype=np.int64)[:, None] * experts
    for part in _parts(expert_ids, top):
        flat = (part.astype(np.int64) + offsets)[part >= 0]
        found += np.bincount(flat, minlength=layers * experts)
    return found.reshape(layers, experts)


def load(expert_ids: Ids, experts: int, top: int | None = None) -> Floats:
    """The share of tokens that choose each expert: (N, L, K) -> (L, E), whose rows sum to k.

    For the tokens of one domain this is the domain specialisation (Eq. 7); k / E is the uniform share.
    """
    return counts(expert_ids, experts, top) / max(len(expert_ids), 1)


class Balance(NamedTuple):
    """How evenly experts are used, for each layer (L,).

    `entropy`: that of the shares over the greatest possible (1: all equal); `max_over_mean`: the busiest expert's load
    over the average; `dead`: the number of experts that no token chose.
    """

    entropy: Floats
    max_over_mean: Floats
    dead: npt.NDArray[np.int64]


def balance(load_LE: Floats) -> Balance:
    """The balance of a load (L, E)."""
    total_L1 = load_LE.sum(axis=1, keepdims=True)
    p_LE = load_LE / np.where(total_L1 == 0, 1, total_L1)
    experts = load_LE.shape[1]
    if experts == 1:  # a single expert is always even
        entropy = (total_L1[:, 0] > 0).astype(np.float64)
    else:
        entropy = (p_LE * np.log(np.where(p_LE > 0, 1 / np.where(p_LE > 0, p_LE, 1), 1))).sum(axis=1) / np.log(experts)
    mean_L = np.where(total_L1 == 0, 1, total_L1)[:, 0] / experts
    return Balance(entropy, load_LE.max(axis=1) / mean_L, (load_LE == 0).sum(axis=1))


def distance(load_LE: Floats, other_LE: Floats) -> Floats:
    """How far two loads are from each other: (L, E) twice -> (L,), total variation, 0 for equal, 1 for nothing shared.

    Between a domain and all domains together it says how special the domain is (of shares as in Eq. 7).
    """
    one, other = (load / np.maximum(load.sum(axis=1, keepdims=True), 1e-300) for load in (load_LE, other_LE))
    return np.abs(one - other).sum(axis=1) / 2


# ---- two routings of the same tokens ----


def saturation(expert_ids: Ids, final_ids: Ids, top: int | None = None) -> Floats:
    """How much of the final routing is already reached: (N, L, K) twice -> (L,), Eq. 5.

    The share of a token's final experts that the earlier checkpoint chooses as well, on average over tokens. Chance is
    k / E. The same number is the agreement of any two models, such as a quantized one with its original.
    """
    if expert_ids.shape[:2] != final_ids.shape[:2]:
        raise ValueError(f"two routings of the same tokens differ in shape: {expert_ids.shape}, {final_ids.shape}")
    total = np.zeros(expert_ids.shape[1])
    for one, other in zip(_parts(expert_ids, top), _parts(final_ids, top), strict=True):
        total += _overlap(one, other).sum(axis=0)
    return total / max(len(expert_ids), 1)


def neighbour_overlap(expert_ids: Ids, starts: Ids | None = None, top: int | None = None) -> Floats:
    """The share of a token's experts that the token before it chose: (N, L, K) -> (L,). Chance is k / E.

    `starts` are the first tokens of documents, which have none before them.
    """
    starts = np.unique([] if starts is None else np.asarray(starts))
    total, pairs = np.zeros(expert_ids.shape[1]), 0
    for first in range(1, len(expert_ids), _PART):
        end = min(first + _PART, len(expert_ids))
        ids = _top(expert_ids[first - 1 : end], top)
        inside = np.ones(end - first, dtype=bool)
        inside[starts[np.searchsorted(starts, first) : np.searchsorted(starts, end)].astype(np.int64) - first] = False
        total += _overlap(ids[1:][inside], ids[:-1][inside]).sum(axis=0)
        pairs += int(inside.sum())
        forget(expert_ids)
    return total / max(pairs, 1)


def _overlap(one: Ids, other: Ids) -> Floats:
    """(n, L, K) twice -> (n, L): experts in both, by the number that the second chose."""
    common = ((one[:, :, :, None] == other[:, :, None, :]) & (other >= 0)[:, :, None, :]).sum(axis=(2, 3))
    return common / np.maximum((other >= 0).sum(axis=2), 1)


# ---- experts together ----


def coactivation(expert_ids: Ids, experts: int, mode: Literal["pairs", "adjacent"] = "pairs") -> Floats:
    """How often expert j is chosen when i is: (N, L, K) -> (L, E, E), Eq. 6. The diagonal is 0.

    "pairs" is the equation: all pairs of a token's experts. "adjacent" is what the published script counts: only pairs
    of neighbours by rank, which makes chance (K-1)/K * 2/(E-1) instead of (K-1)/(E-1).
    """
    n_layers, k = expert_ids.shape[1:]
    together = np.zeros((n_layers, experts, experts), dtype=np.int64)
    for part in _parts(expert_ids, None):
        for layer in range(n_layers):
            ids = part[:, layer]
            if mode == "pairs":
                together[layer] += _pairs(ids, experts)
                continue
            for one, other in [(ids[:, a], ids[:, a + 1]) for a in range(k - 1)]:
                both = (one >= 0) & (other >= 0)
                flat = one[both].astype(np.int64) * experts + other[both]
                neighbours = np.bincount(flat, minlength=experts**2).reshape(experts, experts)
                together[layer] += neighbours + neighbours.T
    alone = counts(expert_ids, experts)
    return together / np.maximum(alone, 1)[:, :, None]


def _pairs(ids: Ids, experts: int) -> npt.NDArray[np.int64]:
    """How many tokens choose each pair of experts: (n, K) -> (E, E), in fp32, which is exact for one part."""
    chosen = np.zeros((len(ids), experts + 1), dtype=np.float32)
    chosen[np.arange(len(ids))[:, None], ids] = 1  # -1, for none, is the column after all experts
    found = (chosen[:, :experts].T @ chosen[:, :experts]).astype(np.int64)
    np.fill_diagonal(found, 0)
    return found


def flow(
    expert_ids: Ids, first: int, second: int, experts: int, mode: Literal["pairs", "ranks"] = "pairs", top: int = 1
) -> npt.NDArray[np.int64]:
    """How many tokens go from expert i of one layer to j of another: (N, L, K) -> (E, E), Fig. 35.

    Of the `top` experts of a token "pairs" counts each with each; "ranks", like the published script, only those of
    equal rank. For `top=1`, as in the figure, both are the same.
    """
    found = np.zeros(experts**2, dtype=np.int64)
    ranks = [(a, b) for a in range(top) for b in range(top) if mode == "pairs" or a == b]
    for part in _parts(expert_ids, top):
        for a, b in ranks:
            one, other = part[:, first, a].astype(np.int64), part[:, second, b].astype(np.int64)
            both = (one >= 0) & (other >= 0)
            found += np.bincount(one[both] * experts + other[both], minlength=experts**2)
    return found.reshape(experts, experts)


# ---- experts and the vocabulary ----


class Vocabulary(NamedTuple):
    """Which ids each expert of a layer takes: `ids` (X,) those that occur, `total` (X,) how often, `share` (X, E).

    `share` is the vocabulary specialisation Voc (Eq. 8): the share of an id's occurrences that choose the expert.
    """

    ids: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]
    share: Floats

    @property
    def mean_of_best(self) -> float:
        """How specialised a layer is (Fig. 30): the largest share of every id, averaged over ids."""
        return float(self.share.max(axis=1).mean()) if len(self.ids) else 0.0

    def of_experts(self) -> Floats:
        """How specialised each expert is (Fig. 23): the mean share of the ids whose favourite it is; nan for none."""
        best, experts = self.share.argmax(axis=1), self.share.shape[1]
        number = np.bincount(best, minlength=experts)
        total = np.bincount(best, weights=self.share.max(axis=1), minlength=experts)
        with np.errstate(invalid="ignore"):
            return np.where(number > 0, total / number, np.nan)

    def top_ids(
        self, expert: int, count: int, least: int = 1, mode: Literal["all", "favourite"] = "all"
    ) -> list[tuple[int, float]]:
        """The ids that an expert takes most of, with their shares, among those that occur `least` times (Table 8).

        "favourite", like the published script, lists an id only for the expert that takes most of it.
        """
        known = np.flatnonzero(self.total >= least)
        if mode == "favourite":
            known = known[self.share[known].argmax(axis=1) == expert]
        order = known[np.lexsort((self.ids[known], -self.total[known], -self.share[known, expert]))][:count]
        return [(int(self.ids[at]), float(self.share[at, expert])) for at in order if self.share[at, expert] > 0]

    def histogram(self, expert: int, bins: int = 10, least: int = 8) -> npt.NDArray[np.int64]:
        """How exclusively an expert takes its ids (Fig. 32): -> (bins,) ids by their share, in equal steps to 1.

        Only ids that the expert took at least `least` times count. Comparing domains shows whether the expert takes the
        same share of an id wherever that occurs.
        """
        share = self.share[:, expert]
        share = share[np.rint(share * self.total) >= least]
        places = np.minimum((share * bins).astype(np.int64), bins - 1)
        return np.bincount(places, minlength=bins)


class Occurrences(NamedTuple):
    """Which ids of a vocabulary a text has: `token_ids` (N,), below 0 for "none"; `ids` (X,) and `total` (X,).

    `rows` (V,) are the indices of ids in `ids`. Made once by `occurrences`, it serves every layer.
    """

    token_ids: Ids
    ids: npt.NDArray[np.int64]
    total: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


def occurrences(token_ids: Ids) -> Occurrences:
    """The ids that occur, and how often. token_ids (N,)."""
    token_ids = np.asanyarray(token_ids)
    number = np.zeros(0, dtype=np.int64)
    for start in range(0, len(token_ids), _PART * _VOCABULARY_PARTS):
        part = token_ids[start : start + _PART * _VOCABULARY_PARTS]
        more = np.bincount(part[part >= 0], minlength=len(number))
        more[: len(number)] += number
        number = more
        forget(token_ids)
    ids = np.flatnonzero(number)
    rows = np.zeros(max(len(number), 1), dtype=np.int64)
    rows[ids] = np.arange(len(ids))
    return Occurrences(token_ids, ids, number[ids], rows)


def vocabulary(
    expert_ids: Ids, token_ids: Ids | Occurrences, layer: int, experts: int, top: int | None = None
) -> Vocabulary:
    """Vocabulary specialisation of a layer (Eq. 8). expert_ids (N, L, K); token_ids (N,), below 0 for "none".

    `token_ids` are the input, the model's predictions, or the true next ids, depending on the question.
    """
    known = token_ids if isinstance(token_ids, Occurrences) else occurrences(token_ids)
    return vocabularies(expert_ids, {"": known}, layer, experts, (top,))["", top]


def vocabularies(
    expert_ids: Ids, tokens: Mapping[str, Occurrences], layer: int, experts: int, tops: Sequence[int | None]
) -> dict[tuple[str, int | None], Vocabulary]:
    """`vocabulary` of several kinds of ids, by name and by `top`, in one pass over expert_ids (N, L, K)."""
    found = {(name, top): np.zeros(len(tokens[name].ids) * experts, dtype=np.int64) for name in tokens for top in tops}
    size = _PART * _VOCABULARY_PARTS
    for start in range(0, len(expert_ids), size):
        ids = _top(expert_ids[start : start + size, layer : layer + 1], None)[:, 0]
        for name, known in tokens.items():
            part = np.asarray(known.token_ids[start : start + size])
            rows = known.rows[np.maximum(part, 0)] * experts
            for top in tops:
                chosen = ids[:, : _checked(top, ids.shape[1])]
                counted = (part >= 0)[:, None] & (chosen >= 0)
                flat = (rows[:, None] + chosen)[counted]
                found[name, top] += np.bincount(flat, minlength=len(found[name, top]))
            forget(known.token_ids)
        forget(expert_ids)
    return {
        (name, top): Vocabulary(
            tokens[name].ids,
            tokens[name].total,
            number.reshape(-1, experts) / np.maximum(tokens[name].total, 1)[:, None],
        )
        for (name, top), number in found.items()
    }


def next_ids(token_ids: Ids, starts: Ids | None = None) -> npt.NDArray[np.int64]:
    """The true next id of each token (N,), -1 for the last one of a document."""
    found = np.full(len(token_ids), -1, dtype=np.int64)
    found[:-1] = token_ids[1:]
    if starts is not None:
        before = np.asarray(starts)[np.asarray(starts) > 0] - 1
        found[before] = -1
    return found


# ---- probabilities ----


class Confidence(NamedTuple):
    """How sure routers are in each layer: means (L,) and histograms over tokens.

    `first` is the probability of the likeliest expert, `margin` its lead over the second, `mass` the sum over all k;
    `histogram` (L, bins) counts `first` in equal steps from 0 to 1; `ranks` (L, K) are means by rank.
    """

    first: Floats
    margin: Floats
    mass: Floats
    histogram: npt.NDArray[np.int64]
    ranks: Floats


def confidence(weights: npt.NDArray[np.floating], bins: int = 20) -> Confidence:
    """From the probabilities of chosen experts (N, L, K), by falling value, as OLMoE uses them: not renormalised."""
    n_layers, k = weights.shape[1:]
    margin, ranks = np.zeros(n_layers), np.zeros((n_layers, k))
    histogram = np.zeros((n_layers, bins), dtype=np.int64)
    for start in range(0, len(weights), _PART):
        part = np.asarray(weights[start : start + _PART], dtype=np.float64)
        first = part[:, :, 0]
        ranks += part.sum(axis=0)
        margin += (first - (part[:, :, 1] if k > 1 else 0)).sum(axis=0)
        places = np.minimum((first * bins).astype(np.int64), bins - 1)
        for layer in range(n_layers):
            histogram[layer] += np.bincount(places[:, layer], minlength=bins)
        forget(weights)
    margin, ranks = margin / max(len(weights), 1), ranks / max(len(weights), 1)
    return Confidence(ranks[:, 0], margin, ranks.sum(axis=1), histogram, ranks)


def _checked(top: int | None, k: int) -> int | None:
    if top is not None and not 1 <= top <= k:
        raise ValueError(f"top must be from 1 to {k}, the experts of a token, not {top}")
    return top


def _top(expert_ids: Ids, top: int | None) -> Ids:
    expert_ids = np.asarray(expert_ids[:, :, : _checked(top, expert_ids.shape[2])])
    if expert_ids.dtype.kind == "u":  # as in traces: the largest value means none
        none = expert_ids == np.iinfo(expert_ids.dtype).max
        expert_ids = np.where(none, np.int32(-1), expert_ids.astype(np.int32))
    return expert_ids


def _parts(expert_ids: Ids, top: int | None) -> Iterator[Ids]:
    for start in range(0, len(expert_ids), _PART):
        yield _top(expert_ids[start : start + _PART], top)
        forget(expert_ids)
