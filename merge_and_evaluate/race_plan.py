"""Which items a race scores in which round: drawn at random within every task, in growing batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import DataError

ROUNDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # parts of the items that are scored after each, by cost
# Items that the first round has at least. Fewer can hardly drop anyone, and each round merges every candidate anew: of
# 120 items five rounds score as many as two, with nearly three times the merges (benchmarks/simulate_race.py --items
# 120).
FIRST_ROUND = 60


@dataclass(frozen=True)
class Stratum:
    """Items of which a share is drawn: a task, or one subject of a group.

    entry: the task or group that counts once in the average. weight: the stratum's share of the average.
    requests: requests to the model that an item makes (multiple choice: one a choice). cost: what an item is taken to
    cost beside the others, in any unit (race_tasks: its requests, so not its time); of two strata of the same weight,
    the one at four times the cost gives half the items.
    """

    name: str
    entry: str
    items: int
    weight: float
    requests: int = 1
    cost: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """A race before it starts.

    strata: those of an entry side by side. margin: in the unit of the item values. order: per stratum its items as
    drawn, int64 (items,). counts: how many of them are scored after each round, int64 (rounds, strata), never falling.
    """

    strata: tuple[Stratum, ...]
    candidates: tuple[str, ...]
    margin: float
    order: tuple[np.ndarray, ...]
    counts: np.ndarray

    @property
    def rounds(self) -> int:
        return len(self.counts)

    @property
    def weights(self) -> np.ndarray:
        return np.array([stratum.weight for stratum in self.strata])

    @property
    def sizes(self) -> np.ndarray:
        return np.array([stratum.items for stratum in self.strata])

    def sample(self, number: int) -> tuple[np.ndarray, ...]:
        """Per stratum the items that are scored after round `number`, in the order in which they were drawn."""
        return tuple(order[:count] for order, count in zip(self.order, self.counts[number], strict=True))


@dataclass(frozen=True)
class Cost:
    """What a race takes: scorings (one candidate in one round: a merge, if models are not kept), items, requests."""

    scorings: int
    items: int
    requests: int


def strata_of(
    entries: Mapping[str, Mapping[str, int]],
    requests: Mapping[str, int] | None = None,
    costs: Mapping[str, float] | None = None,
) -> tuple[Stratum, ...]:
    """{entry: {leaf task: items}} -> strata: entries weigh the same, leaves share their entry's weight equally.

    {"arc": {"arc": 8}, "mmlu": {"law": 4, "art": 2}} -> weights 1/2, 1/4, 1/4. requests, costs: {leaf: of an item}.
    """
    requests, costs = requests or {}, costs or {}
    return tuple(
        Stratum(leaf, entry, items, 1 / len(entries) / len(leaves), requests.get(leaf, 1), costs.get(leaf, 1.0))
        for entry, leaves in entries.items()
        for leaf, items in leaves.items()
    )


def plan(
    strata: Sequence[Stratum], candidates: Sequence[str], margin: float, seed: int, first_round: int = FIRST_ROUND
) -> Plan:
    """Draw the order of every stratum's items and fix the rounds. margin: 0.005 is half a point of a score in 0..1.
    first_round: items that the first has at least; smaller ones are left out, and of fewer items all are the one round.

    A stratum's order depends on the seed, its name and its size alone. Raises DataError where there is no race to run.
    """
    _check_race(candidates, margin)
    entries = list(dict.fromkeys(stratum.entry for stratum in strata))
    strata = tuple(sorted(strata, key=lambda stratum: entries.index(stratum.entry)))
    _check_strata(strata)
    order = tuple(np.random.default_rng([seed, *s.name.encode()]).permutation(s.items) for s in strata)
    shares = [share_out(strata, part) for part in ROUNDS]
    counts = np.array([share for share in shares[:-1] if share.sum() >= first_round] + shares[-1:])
    return Plan(strata, tuple(candidates), margin, order, counts)


def _check_race(candidates: Sequence[str], margin: float) -> None:
    if len(candidates) < 2:
        raise DataError(f"a race needs two candidates or more and got {len(candidates)}: give more weights or recipes")
    if twice := [name for name in candidates if list(candidates).count(name) > 1]:
        raise DataError(f"candidate {twice[0]!r} is in the race twice: name each candidate once")
    if not (math.isfinite(margin) and margin >= 0):
        raise DataError(f"the margin of the race is {margin}; needed: a finite number, 0 or more")


def _check_strata(strata: tuple[Stratum, ...]) -> None:
    if not strata:
        raise DataError("a race needs tasks to score on and got none: name them with --choose_on")
    names = [stratum.name for stratum in strata]
    for s in strata:
        if names.count(s.name) > 1:
            raise DataError(f"task {s.name!r} is in the race twice: name each task once")
        if s.items < 1:
            raise DataError(f"task {s.name!r} has {s.items} items; a race needs at least one: leave the task out")
        for what, value in (("weight", s.weight), ("requests", s.requests), ("cost", s.cost)):
            if not (math.isfinite(value) and value > 0):
                raise DataError(f"task {s.name!r} has {what} {value} in the race; needed: a finite number above 0")


def share_out(strata: Sequence[Stratum], part: float) -> np.ndarray:
    """Items to score of each stratum, int64 (strata,), that cost at most `part` of what all items cost; at least one
    each.

    Not in proportion to the sizes but to weight/√cost, as far as there are items. Of 10,042 items in one task and 817
    in another that counts as much, a sixteenth each would leave the error to the small one and the work to the large
    one (Neyman's allocation with equal variances: Cochran, Sampling Techniques, 3rd ed., 5.5). Two tasks of the same
    weight, 1,000 and 60 items: a half is 470 and 60, not 500 and 30.
    """
    sizes = np.array([stratum.items for stratum in strata])
    costs = np.array([stratum.cost for stratum in strata])
    if part >= 1:
        return sizes
    ideal = np.array([stratum.weight for stratum in strata]) / np.sqrt(costs)

    def taken(scale: float) -> np.ndarray:
        return np.minimum(sizes, np.maximum(1, np.floor(scale * ideal))).astype(np.int64)

    # taken() never falls as its scale grows, so a larger part holds a smaller one's items: nothing is drawn in vain.
    low, high = 0.0, float(((sizes + 1) / ideal).max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) @ costs <= part * (sizes @ costs) else (low, middle)
    return taken(low)


def most(race: Plan) -> Cost:
    """What the race takes at most: every candidate in every round, every item once."""
    count = len(race.candidates)
    requests = sum(stratum.items * stratum.requests for stratum in race.strata)
    return Cost(count * race.rounds, count * int(race.sizes.sum()), count * requests)
