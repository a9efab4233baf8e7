"""Who drops out of a race, and when it ends: all candidates on the same items, in growing batches.

After each round a candidate that cannot be better than the leader by more than the margin drops out. Nothing here reads
or writes: where a race stands is a function of what has been scored, so that one that was interrupted resumes where it
was, and no item is scored twice.

    race = plan(strata_of({"arc": {"arc": 1172}, "mmlu": {"law": 1534, "art": 100}}), ("0.6", "0.9"), 0.005, seed=0)
    scored = {name: unscored(race) for name in race.candidates}
    while (step := next_step(race, scored)).to_score:
        ...  # score what it names, and fill it in
    print(outcome(race, step))

What is compared: a candidate's score is the weighted mean of its strata's means, as in the results table (tasks count
the same; a group is the mean of its subjects). What is looked at is its items' values minus the leader's.

How sure: the race wants the winner of the full grid, so the full grid's items are the whole population. The standard
error has the finite population correction; after the last round it is 0, and nothing is left to err (Cochran, Sampling
Techniques, 3rd ed., 5.3). A bound holds at 95 %, one-sided, spent over all rounds but the last by O'Brien and Fleming's
function (Lan and DeMets, Biometrika 1983) with a round as the unit of time. What a round may spend is spent there
alone: with twice the items each time, and the correction, rounds have so little in common that joint bounds would
hardly be narrower. The bound is not widened for the number of candidates. It costs the promise only where the best one
drops out, and by benchmarks/simulate_race.py the winner stays within the margin in 97 % of the hardest races (all
others equal, just outside the margin), with 36 candidates as with 6; widened, it takes a third more items.

"Worse" claims more: that the leader wins on new items of the same kind, as --compare asks. So it is without the
population correction, and 5 % are shared among all ordered pairs (Bonferroni), since nobody knew before who would lead.
Every round has the same share of it: a loser drops out early and is never looked at again, so what is saved for the end
would be lost. The margin alone decides who drops out; those who dropped out without being worse cannot be told apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from merge_and_evaluate.race_plan import Plan
from merge_and_evaluate.statistics import PSEUDO_ITEMS

ALPHA = 0.05

Scored = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Drop:
    """A candidate that dropped out after round `round` (0 is the first), and why, in the unit of the item values.

    difference: candidate minus leader. stderr: of what all items would show; stderr_new: of what new items would,
    None if all candidates had the same value on every item, which gives it no scale.
    bound: the most by which the candidate may be better. worse: whether the leader is better on new items too.
    """

    candidate: str
    leader: str
    round: int
    difference: float
    stderr: float
    stderr_new: float | None
    bound: float
    worse: bool


@dataclass(frozen=True, eq=False)
class Step:
    """Where a race stands. to_score: {candidate: {stratum: item numbers, ascending}}; empty when it has ended."""

    round: int
    racing: tuple[str, ...]
    leader: str | None
    dropped: tuple[Drop, ...]
    to_score: dict[str, dict[str, np.ndarray]]

    @property
    def undecided(self) -> tuple[str, ...]:
        """Who cannot be told apart from the leader: those that dropped out, but not as worse."""
        return tuple(drop.candidate for drop in self.dropped if not drop.worse)


def unscored(race: Plan) -> dict[str, np.ndarray]:
    """A candidate before its first item: {stratum: float64 (items,), NaN where not scored}."""
    return {stratum.name: np.full(stratum.items, np.nan) for stratum in race.strata}


# --- the state ------------------------------------------------------------------------------------


def next_step(race: Plan, scored: Scored) -> Step:
    """Replay the race on what is scored: {candidate: {stratum: float64 (items,)}}, larger is better, NaN = not yet.

    Values of rounds that a candidate has not reached are not looked at. Raises DataError if a value is infinite.
    """
    racing, leader, dropped = race.candidates, None, ()
    for number in range(race.rounds):
        to_score = {name: missing for name in racing if (missing := _missing(race, number, scored[name], name))}
        if to_score:
            return Step(number, racing, leader, dropped, to_score)
        leader, out = decide(race, number, racing, _gather(race, number, [scored[name] for name in racing]))
        dropped += out
        racing = tuple(name for name in racing if name not in {drop.candidate for drop in out})
        if len(racing) == 1:
            break
    return Step(number, racing, leader, dropped, {})


def _missing(race: Plan, number: int, values: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """{stratum: items} of a round that are not scored, ascending as lm-eval wants them; strata without any left out."""
    missing = {}
    for stratum, items in zip(race.strata, race.sample(number), strict=True):
        found = values[stratum.name]
        if found.shape != (stratum.items,):
            raise DataError(
                f"candidate {name!r}: task {stratum.name!r} has values of shape {found.shape} in the race; "
                f"needed: one for each of its {stratum.items} items"
            )
        if np.isinf(found[items]).any():
            raise DataError(
                f"candidate {name!r}: task {stratum.name!r} has an infinite value at item "
                f"{items[np.isinf(found[items])].min()}; a race needs finite ones: look at this model's outputs"
            )
        if np.isnan(found[items]).any():
            missing[stratum.name] = np.sort(items[np.isnan(found[items])])
    return missing


def _gather(race: Plan, number: int, values: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """The values of a round, float64 (candidates, items), stratum after stratum."""
    drawn = list(zip(race.strata, race.sample(number), strict=True))
    return np.array([np.concatenate([of_one[s.name][items] for s, items in drawn]) for of_one in values])


# --- a round --------------------------------------------------------------------------------------


def decide(race: Plan, number: int, racing: Sequence[str], values: np.ndarray) -> tuple[str, tuple[Drop, ...]]:
    """(leader, who drops out) after round `number`, of values float64 (racing, items), stratum after stratum.

    The leader has the largest weighted mean, the first of several equal ones. After the last round all others drop out.
    """
    counts = race.counts[number]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    scores = np.add.reduceat(values, starts, axis=1) @ (race.weights / counts)
    best = int(np.argmax(scores))
    difference, stderr, stderr_new, freedom = estimate(race, number, values - values[best])
    bound = difference + _width(number, race.rounds - 1, ALPHA, freedom) * stderr
    pairs = len(race.candidates) * (len(race.candidates) - 1)
    worse = difference + _quantile(ALPHA / pairs / race.rounds, freedom) * stderr_new < 0
    leader = racing[best]
    out = [i for i in range(len(racing)) if i != best and bound[i] <= race.margin]
    known = [float(each) if np.isfinite(each) else None for each in stderr_new]
    drops = (
        Drop(
            racing[i], leader, number, float(difference[i]), float(stderr[i]), known[i], float(bound[i]), bool(worse[i])
        )
        for i in out
    )
    return leader, tuple(drops)


def estimate(race: Plan, number: int, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Weighted means of item differences float64 (candidates, items) with their standard errors, and degrees of
    freedom.

    -> (mean, standard error of the mean of all items, of the mean over new items), each (candidates,); freedom: int.
    The variance is pooled over an entry's strata: MMLU's subjects give a handful of items each, too few for a variance
    of their own. What the subjects' means differ by counts into it, which errs on the wide side (collapsed strata,
    Cochran 5A.12).
    """
    counts, sizes = race.counts[number], race.sizes
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    entries = [stratum.entry for stratum in race.strata]
    firsts = np.array([i for i, entry in enumerate(entries) if i == 0 or entry != entries[i - 1]])
    entry_of = np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(entries)]))
    sums = np.add.reduceat(differences, starts, axis=1)
    squares = np.add.reduceat(differences**2, starts[firsts], axis=1)
    entry_counts, entry_sums = np.add.reduceat(counts, firsts), np.add.reduceat(sums, firsts, axis=1)
    # Zero everywhere is agreement so far, not certainty: without any difference seen there is no scale for a bound.
    largest = np.abs(differences).max() or np.inf
    # Without pseudo-items the first sixty 0/1 items of candidates that disagree on 2 % may show no variance, and the
    # bound would have no width.
    pseudo = PSEUDO_ITEMS / len(firsts)
    spread = squares - entry_sums**2 / entry_counts + pseudo * largest**2
    variance = spread / (entry_counts - 1 + pseudo)
    of_means = variance[:, entry_of] * race.weights**2 / counts
    left = counts < sizes  # summed only where items are left: infinity times 0 would be NaN
    stderr = np.sqrt(of_means[:, left] @ (1 - counts / sizes)[left])
    return sums @ (race.weights / counts), stderr, np.sqrt(of_means.sum(axis=1)), int((entry_counts - 1).sum())


def spent(alpha: float, time: float) -> float:
    """The error that may have been made by `time` in 0..1, O'Brien and Fleming's way: 0.05 at 1/2 -> 0.0056."""
    from scipy.special import ndtr, ndtri  # scipy takes its time: not for --help

    return float(2 * ndtr(ndtri(alpha / 2) / np.sqrt(time))) if time > 0 else 0.0


def _width(number: int, looks: int, alpha: float, freedom: int) -> float:
    """How many standard errors wide a bound of round `number` is, alpha being spent over `looks` rounds; 0 after
    those."""
    if number >= looks:
        return 0.0
    return _quantile(spent(alpha, (number + 1) / looks) - spent(alpha, number / looks), freedom)


def _quantile(alpha: float, freedom: int) -> float:
    """What Student's t exceeds with probability alpha: (0.025, 10**6) -> 1.96."""
    from scipy.special import stdtrit

    return float(-stdtrit(max(freedom, 1), alpha))


# --- what is said ---------------------------------------------------------------------------------


def why_dropped(race: Plan, drop: Drop, unit: str) -> str:
    """Why a candidate dropped out. unit: what a hundredth of the values' unit is called, "points" of a score."""
    items, all_items = int(race.counts[drop.round].sum()), int(race.sizes.sum())
    start = f"{drop.candidate} drops out after {items:,} of {all_items:,} items: "
    if drop.stderr_new is None:
        return f"{start}the same on all items as {drop.leader}"
    gap = f"{_gap(drop)} {unit} behind {drop.leader}"
    if drop.worse:
        return f"{start}worse, {gap}"
    if drop.round + 1 == race.rounds:
        return f"{start}{gap}, on all items"
    if drop.bound <= 0:
        return f"{start}{gap}, and not better on all of them (95 %)"
    return f"{start}{gap}, and at most {100 * drop.bound:.2f} better (margin {100 * race.margin:g})"


def _gap(drop: Drop) -> str:
    return f"{100 * abs(drop.difference):.2f} ± {100 * drop.stderr_new:.2f}"


def _by(drop: Drop) -> str:
    return ", the same on all items" if drop.stderr_new is None else f" by {_gap(drop)}"


def outcome(race: Plan, step: Step, unit: str) -> str:
    """How a race ended, in lines: the winner, who is worse for sure, and who was behind when it dropped out, the
    nearest first."""
    items, all_items = int(race.counts[step.round].sum()), int(race.sizes.sum())
    lines = [f"{step.leader} wins after {items:,} of {all_items:,} items"]
    worse = [
        drop.candidate + ("" if drop.leader == step.leader else f" (than {drop.leader})")
        for drop in step.dropped
        if drop.worse
    ]
    if worse:
        lines.append(f"- worse, on new items too (95 %, over all pairs): {', '.join(worse)}")
    behind = [
        f"{drop.candidate}{_by(drop)}" + ("" if drop.leader == step.leader else f" (behind {drop.leader})")
        for drop in sorted(step.dropped, key=lambda drop: -drop.difference)
        if not drop.worse
    ]
    if behind:
        lines.append(f"- behind, though new items might say otherwise, in {unit}: {', '.join(behind)}")
    return "\n".join(lines)
