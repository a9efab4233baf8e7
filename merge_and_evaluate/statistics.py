"""Paired statistics: is one row better than another, and how sure is that?

Pure functions on arrays of item scores; scipy computes. All differences and standard errors are in the scores' own
unit (0 to 1 for accuracies). Sources: McNemar (1947), exact form; Holm (1979); Miller, "Adding Error Bars to Evals"
(2024) for why two models on the same questions are compared pair by pair.
"""

import math
from dataclasses import dataclass, field

LEVEL = 0.05
POWER = 0.8
NO_DIFFERENCE = 1e-12  # what sums of floats leave of differences that cancel, or that are all alike

# Items counted as if seen on top, half won and half lost by the largest difference that was seen, where few items may
# show no variance by chance. (Bonett and Price, J. Educ. Behav. Stat. 2012, add two to paired proportions.)
PSEUDO_ITEMS = 2.0


@dataclass(frozen=True)
class Difference:
    """value ± stderr of a difference, its p-value (two-sided; None where there is none), over how many items,
    whether pair by pair; largest: of the differences between two items, 0 where that is not known."""

    value: float
    stderr: float | None
    p: float | None
    items: int
    paired: bool = True
    largest: float = field(default=0.0, compare=False)


def paired_difference(first: list[float], second: list[float]) -> Difference:
    """second − first over the same items: mean of d, sd(d)/√n with n − 1 in sd; p exact McNemar where all scores are
    0 or 1, else a paired t test. ([0, 0, 1, 1], [1, 1, 1, 1]) -> 0.5 ± 0.2887, p 0.5."""
    import numpy as np

    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    d, n = b - a, len(a)
    stderr = (0.0 if _alike(d) else float(np.std(d, ddof=1)) / math.sqrt(n)) if n > 1 else None
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    p = mcnemar(int((d > 0).sum()), int((d < 0).sum())) if binary else paired_t(d)
    return Difference(float(np.mean(d)), stderr, p, n, largest=float(np.abs(d).max()))


def _alike(d) -> bool:
    """Whether all differences are the same but for rounding: 0.6 - 0.5 and 0.7 - 0.6 are."""
    return float(d.max() - d.min()) <= NO_DIFFERENCE * max(1.0, float(abs(d).max()))


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p of `better` against `worse` discordant items, binomial at one half: (8, 2) -> 0.109375."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def paired_t(d) -> float | None:
    """Two-sided p of a mean of d that is 0: t with n − 1 degrees of freedom. None for fewer than two items."""
    from scipy.stats import ttest_1samp

    if len(d) < 2:
        return None
    if _alike(d):  # no spread, so no t: all differences alike are a sign test's all heads
        return mcnemar(len(d), 0) if abs(d[0]) > NO_DIFFERENCE else 1.0
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
    """second − first of two scores (value, standard error) that share no items: √(se² + se²), normal p; of two without
    spread (none right, and all right) a sign test's."""
    (a, a_stderr), (b, b_stderr) = first, second
    stderr = None if None in (a_stderr, b_stderr) else math.hypot(a_stderr, b_stderr)
    p = mcnemar(items, 0) if stderr == 0 and a != b else normal_p(b - a, stderr)
    return Difference(b - a, stderr, p, items, paired=False)


def mean_difference(parts: list[Difference]) -> Difference:
    """The plain mean of independent differences, each counting once: standard error √(Σ se²)/T, normal p; one part
    alone keeps its own, exact, p. A part without spread has the standard error of stderr_without_spread; where no part
    has any, p is McNemar's over the items of all."""
    if len(parts) == 1:
        return parts[0]
    value, largest = math.fsum(part.value for part in parts) / len(parts), max(part.largest for part in parts)
    stderrs = [part.stderr or stderr_without_spread(part, PSEUDO_ITEMS / len(parts), largest) for part in parts]
    known = None not in stderrs
    stderr = math.sqrt(math.fsum(each**2 for each in stderrs)) / len(parts) if known else None
    items, paired = sum(part.items for part in parts), all(part.paired for part in parts)
    p = normal_p(value, stderr)
    if paired and not any(part.stderr is None or part.stderr for part in parts):
        ups, downs = (sum(part.items for part in parts if part.value * sign > 0) for sign in (1, -1))
        p = mcnemar(ups, downs)
    return Difference(value, stderr, p, items, paired, largest)


def stderr_without_spread(part: Difference, pseudo: float, largest: float) -> float | None:
    """What a part whose items are all alike counts with in a mean, where 0 would call it certain; None if not known.

    Where all differ the same way, the standard error at which the normal distribution gives the part's own exact p: 5
    of 5 items better, p 0.0625 -> 1/1.86. Where none differs, that of `pseudo` items on top that differ by `largest`,
    half of them each way, as in a race (race.estimate).
    """
    from scipy.stats import norm

    if part.stderr is None or part.p is None:
        return None
    if abs(part.value) > NO_DIFFERENCE:
        return abs(part.value) / float(norm.isf(part.p / 2)) if part.p < 1 else None
    return largest * math.sqrt(pseudo / (part.items - 1 + pseudo) / part.items) if part.items else 0.0


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

    if abs(difference.value) < NO_DIFFERENCE or not difference.stderr:
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
