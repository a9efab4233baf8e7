"""Which weights to try next: CMA-ES over λ as in CABS+ (arXiv 2608.12842), a function of what has been tried.

    search = Search(dimensions=2, evaluations=60, seed=0)
    trials = []
    while (proposal := propose(search, trials)).candidates:
        trials += [Trial(weights, objective(weights)) for weights in proposal.candidates]
    best(trials).weights

Nothing here reads or writes, and nothing is kept between calls: each replays the search on what was recorded (a
fraction of a second for 300 trials), so that one that was interrupted proposes what it would have proposed. Values are
the caller's, and larger is better: a mean score, or the mean log-probability of the right answer.

CABS+'s settings are the defaults: λ in [0.1, 2], start 1, σ 0.05, populations of 6 of which 3 are parents, at most 50
generations, an end after 6 without a significant change, projection on the box, the best of everything tried wins.
Differs from its code: the start itself is tried first (the winner is never worse than it), the draws are seeded, λ has
four decimals, so that a recipe shows what was tried and no processor's last bit changes a replay.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import DataError

DECIMALS = 4

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """What is searched, and how far.

    dimensions: λ to find. patience: generations in which the best value must rise by `tolerance`, in the values' unit
    (0.001 is a tenth of a point of a score, or a thousandth of a nat), for the search to continue.
    """

    dimensions: int
    evaluations: int
    seed: int
    low: float = 0.1
    high: float = 2.0
    start: float = 1.0
    sigma: float = 0.05
    population: int = 6
    generations: int = 50
    patience: int = 6
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Trial:
    """Weights that were tried, and their value: larger is better."""

    weights: Weights
    value: float


@dataclass(frozen=True)
class Proposal:
    """What to try next, in generation `generation` (0: the start alone); with nothing to try, `ended` says why."""

    generation: int
    candidates: tuple[Weights, ...]
    ended: str | None = None


def propose(search: Search, trials: Sequence[Trial]) -> Proposal:
    """Replay the search on its trials, in any order: the rest of the generation that is not known in full, or the end.

    Raises DataError for values that do not rank (NaN, infinite, a first generation of equals), and for trials that this
    search would not have made.
    """
    _check(search)
    values = _values(trials)
    evolution, candidates = _evolution(search), ((search.start,) * search.dimensions,)
    proposed, best_so_far = set(), []
    for generation in range(search.generations + 1):
        proposed.update(candidates)
        ended = None
        if missing := [weights for weights in dict.fromkeys(candidates) if weights not in values]:
            _refuse_strangers(values, proposed)
            left = search.evaluations - len(values)
            reason = None if left > 0 else f"all {search.evaluations} evaluations are used"
            return Proposal(generation, tuple(missing[: max(left, 0)]), reason)
        found = [values[weights] for weights in candidates]  # with repeats: CMA-ES may propose one point twice
        best_so_far.append(max([*best_so_far[-1:], *found]))
        if generation:
            ended = _why_ended(search, best_so_far, found)
            _tell(evolution, candidates, found)
        if ended:
            break
        candidates = _ask(search, evolution)
    _refuse_strangers(values, proposed)
    return Proposal(generation, (), ended or f"all {search.generations} generations are done")


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the largest value, the first of several equal ones. Raises DataError without any."""
    _values(trials)
    if not trials:
        raise DataError(
            "the search has tried nothing yet, so it has no best weights; give it --evaluations of 1 or more"
        )
    return max(trials, key=lambda trial: trial.value)


# --- replay ---------------------------------------------------------------------------------------


def _check(search: Search) -> None:
    if search.dimensions < 1 or search.evaluations < 1 or search.population < 2:
        raise DataError(
            f"a search needs a weight, an evaluation and a population of 2 at least, not {search.dimensions}, "
            f"{search.evaluations} and {search.population}"
        )
    if not (search.low <= search.start <= search.high and search.low < search.high and search.sigma > 0):
        raise DataError(
            f"a search from {search.start:g} in steps of {search.sigma:g} does not start in [{search.low:g}, "
            f"{search.high:g}]: give a start inside the range and a step above 0"
        )


def _values(trials: Sequence[Trial]) -> dict[Weights, float]:
    """{weights: value}. Raises DataError for what does not rank, and for weights with two values."""
    values = {}
    for trial in trials:
        if not math.isfinite(trial.value):
            raise DataError(
                f"weights {_said(trial.weights)} have the value {trial.value} in the search; needed: a finite number: "
                "look at this merge's outputs, or narrow the range"
            )
        if values.setdefault(trial.weights, trial.value) != trial.value:
            raise DataError(
                f"weights {_said(trial.weights)} have two values in the search's record, {values[trial.weights]} and "
                f"{trial.value}; needed: one. Delete the record to start anew"
            )
    return values


def _refuse_strangers(values: Mapping[Weights, float], proposed: set[Weights]) -> None:
    if strangers := [weights for weights in values if weights not in proposed]:
        raise DataError(
            f"weights {_said(strangers[0])} are in the search's record, but this search would not have tried them: "
            "resume with the seed and the settings of the record, or delete it to start anew"
        )


def _said(weights: Weights) -> str:
    return " / ".join(f"{weight:g}" for weight in weights)


def _why_ended(search: Search, best_so_far: list[float], found: list[float]) -> str | None:
    """Why the search ends after this generation, or None. A generation of equals gives no direction to search in."""
    generation = len(best_so_far) - 1
    if min(found) == max(found):
        if generation == 1:
            raise DataError(
                f"all {len(found)} weights of the search's first generation have the value {found[0]:g}, so none can "
                "be preferred: choose on more items, by --choose_by gold, or with larger steps"
            )
        return f"all weights of generation {generation} have the same value"
    if generation >= search.patience and best_so_far[-1] - best_so_far[-1 - search.patience] < search.tolerance:
        return f"no rise by {search.tolerance:g} in {search.patience} generations"
    return None


# --- cma ------------------------------------------------------------------------------------------


def _evolution(search: Search):
    """The library's strategy with draws of its own: by default it would seed and use numpy's global generator."""
    import cma  # takes its time: not for --help

    rng = np.random.default_rng(search.seed)
    options = {
        "popsize": search.population,
        "CMA_mu": search.population // 2,
        "randn": lambda *shape: rng.standard_normal(shape),
        "seed": math.nan,
        "verbose": -9,
        "verb_log": 0,
    }
    # In one dimension the library would only warn that it is not made for that; its update is the same there.
    return cma.CMAEvolutionStrategy([search.start] * search.dimensions, search.sigma, options)


def _ask(search: Search, evolution) -> tuple[Weights, ...]:
    """A generation, projected on the box and rounded: what is tried is what the strategy is told about."""
    projected = np.clip(evolution.ask(), search.low, search.high)
    return tuple(tuple(round(float(weight), DECIMALS) for weight in weights) for weights in projected)


def _tell(evolution, candidates: Sequence[Weights], values: Sequence[float]) -> None:
    """Told are ranks, which are all that CMA-ES uses; equal values rank in the order in which they were proposed."""
    ranks = np.argsort(np.argsort(-np.array(values), kind="stable"), kind="stable")
    # Unchecked: the library would take rounded points for foreign ones and shorten the long steps among them.
    evolution.tell([np.array(weights) for weights in candidates], ranks.astype(float).tolist(), check_points=False)


# --- what weights mean ----------------------------------------------------------------------------


def per_layer(weights: Weights, vectors: int, groups: int, layers: int) -> tuple[tuple[float, ...], ...]:
    """Weights by vector and group of layers, vector after vector -> weights by vector and layer.

    ((a, b, c, d), 2 vectors, 2 groups, 3 layers) -> ((a, a, b), (c, c, d)). As a list under `weight` in a recipe, one
    entry a layer, mergekit takes entry i for layer i; what is in no layer (embeddings, head) gets the first. Raises
    DataError where groups and weights do not fit.
    """
    if not 1 <= groups <= layers:
        raise DataError(f"{groups} groups of layers in a model of {layers} layers; needed: 1 to {layers}")
    if len(weights) != vectors * groups:
        raise DataError(
            f"{len(weights)} weights for {vectors} vectors of {groups} groups of layers; needed: one for each"
        )
    rows = (weights[vector * groups : (vector + 1) * groups] for vector in range(vectors))
    return tuple(tuple(row[layer * groups // layers] for layer in range(layers)) for row in rows)
