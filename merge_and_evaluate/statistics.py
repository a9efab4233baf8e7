"""Paired statistics: is one row better than another, and how sure is that?

Pure functions on arrays of item scores; scipy computes. All differences and standard errors are in the scores' own
unit (0 to 1 for accuracies). Sources: McNemar (1947), exact form; Holm (1979); Miller, "Adding Error Bars to Evals"
(2024) for why two models on the same questions are compared pair by pair.
"""

import math
from dataclasses import dataclass

LEVEL = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """value ± stderr of a difference, its p-value (two-sided; None where there is none), over how many items,
    whether pair by pair."""

    value: float
    stderr: float | None
    p: float | None
    items: int
    paired: bool = True


def paired_difference(first: list[float], second: list[float]) -> Difference:
    """second − first over the same items: mean of d, sd(d)/√n with n − 1 in sd; p exact McNemar where all scores are
    0 or 1, else a paired t test. ([0, 0, 1, 1], [1, 1, 1, 1]) -> 0.5 ± 0.2887, p 0.5."""
    import numpy as np

    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    d, n = b - a, len(a)
    stderr = float(np.std(d, ddof=1)) / math.sqrt(n) if n > 1 else None
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    p = mcnemar(int((d > 0).sum()), int((d < 0).sum())) if binary else paired_t(d)
    return Difference(float(np.mean(d)), stderr, p, n)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p of `better` against `worse` discordant items, binomial at one half: (8, 2) -> 0.109375."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def paired_t(d) -> float | None:
    """Two-sided p of a mean of d that is 0: t with n − 1 degrees of freedom. None for fewer than two items."""
    from scipy.stats import ttest_1samp

    if len(d) < 2:
        return None
    if (d == d[0]).all():  # no spread, so no t: all differences alike are a sign test's all heads
        return mcnemar(len(d), 0) if d[0] else 1.0
    return float(ttest_1samp(d, 0.0).pvalue)


def normal_p(value: float, stderr: float | None) -> float | None:
    """Two-sided p of value/stderr under the normal distribution: (1.96, 1) -> 0.05."""
    from scipy.stats import norm

    if stderr is None:
        return None
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * norm.sf(abs(value) / stderr))


def unpaired_difference(
    first: tuple[float, float | None], second: tuple[float, float | None], items: int
) -> Difference:
    """second − first of two scores (value, standard error) that share no items: √(se² + se²), normal p."""
    (a, a_stderr), (b, b_stderr) = first, second
    stderr = None if None in (a_stderr, b_stderr) else math.hypot(a_stderr, b_stderr)
    return Difference(b - a, stderr, normal_p(b - a, stderr), items, paired=False)


def mean_difference(parts: list[Difference]) -> Difference:
    """The plain mean of independent differences, each counting once: standard error √(Σ se²)/T, normal p; one part
    alone keeps its own, exact, p. Where no part has any spread, p is McNemar's over the items of all."""
    if len(parts) == 1:
        return parts[0]
    value = math.fsum(part.value for part in parts) / len(parts)
    known = all(part.stderr is not None for part in parts)
    stderr = math.sqrt(math.fsum(part.stderr**2 for part in parts)) / len(parts) if known else None
    items, paired = sum(part.items for part in parts), all(part.paired for part in parts)
    p = normal_p(value, stderr)
    if stderr == 0 and paired:
        ups, downs = (sum(part.items for part in parts if part.value * sign > 0) for sign in (1, -1))
        p = mcnemar(ups, downs)
    return Difference(value, stderr, p, items, paired)


def holm(ps: list[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the order given: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]; None stays None."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i])
    adjusted, largest = list(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def items_needed(difference: Difference) -> int | None:
    """How many items, in the same proportions, would show a difference of this size: n · ((z₀.₉₇₅ + z₀.₈) · se/d)²,
    at 80 % power and 5 %. None where the difference is 0 or its standard error unknown or 0."""
    from scipy.stats import norm

    if not difference.value or not difference.stderr:
        return None
    reach = float(norm.isf(LEVEL / 2) + norm.ppf(POWER))
    return math.ceil(difference.items * (reach * difference.stderr / difference.value) ** 2)


def interval(difference: Difference) -> tuple[float, float] | None:
    """The 95 % interval, value ± 1.96 standard errors."""
    from scipy.stats import norm

    if difference.stderr is None:
        return None
    half = float(norm.isf(LEVEL / 2)) * difference.stderr
    return difference.value - half, difference.value + half
