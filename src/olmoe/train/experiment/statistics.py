"""Statistics over seeds, for few of them: means, Student's t intervals and paired tests. Nothing but `math`.

Runs of one seed see the same data in the same order, so arms are compared by the differences within seeds: what a seed
does to all arms alike cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its standard deviation and its interval of 95 %; nan for what one seed cannot say.

    `t` and `p` (two-sided) are of the hypothesis that the true mean is zero.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    t: float
    p: float


def estimate(values: Sequence[float]) -> Estimate:
    """What values from different seeds say about their mean, if they are roughly normal. There must be at least one."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(n, mean, *[math.nan] * 5)
    sd = statistics.stdev(values)
    error = sd / math.sqrt(n)
    half = t_quantile(CONFIDENCE, n - 1) * error
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Estimate(n, mean, sd, mean - half, mean + half, t, 1 - t_within(t, n - 1))


def paired(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """The mean of b - a over seeds; both in the same order of seeds."""
    return estimate([y - x for x, y in zip(a, b, strict=True)])


def holm(ps: Sequence[float]) -> list[float]:
    """p values of several tests, adjusted so that the family-wise error rate stays below the level (Holm)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    raised, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - rank)))
        raised[i] = highest
    return raised


def t_within(t: float, df: int) -> float:
    """The probability that Student's t with `df` degrees of freedom is between -|t| and |t|.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, which are exact.
    """
    if math.isinf(t):
        return 1.0
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (1.0, 1.0) if df % 2 == 0 else (cosine, cosine if df > 1 else 0.0)
    for k in range(2 if df % 2 else 1, df - 2, 2):
        term *= k / (k + 1) * cosine**2
        total += term
    return sine * total if df % 2 == 0 else 2 / math.pi * (angle + sine * total)


def t_quantile(within: float, df: int) -> float:
    """The t between whose negative and itself the probability is `within`: 2.776 for 0.95 and 4."""
    low, high = 0.0, 1.0
    while t_within(high, df) < within:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < within else (low, middle)
    return high
