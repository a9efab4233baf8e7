#!/usr/bin/env python3
"""Simulate races against the full grid: what a race saves and what it loses; print a table and one JSON line.

    python benchmarks/simulate_race.py --races 200

The model. An item has a latent difficulty and a response to λ that is smooth in λ (a Gaussian process, so that near
weights answer alike), both normal: a candidate is right where their sum lies below the quantile of its accuracy. How
strongly items respond is set so that two candidates of equal accuracy disagree on the given share of items, on average.
Accuracy over λ, the same in all tasks: flat; gentle (2.4 points between the best weight and the worst, as published for
a pair of 7B models); peaked (6 points); slippage (one weight ahead of all others, which are equal, by the margin and a
tenth of a point: the hardest case for the promise). Every race draws its items anew, and the full grid's winner is that
of its items.

The promise: in at least 95 % of races of every row the winner loses no more than the margin against the full grid's.
The decisions are those of merge_and_evaluate/race.py itself, on the arrays that it gets from real scores.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from scipy.special import ndtri

from common.cli import positive_int
from common.exits import run
from merge_and_evaluate.race import decide
from merge_and_evaluate.race_plan import FIRST_ROUND, Plan, plan, strata_of

# Task sizes as on the Open LLM Leaderboard v1; MMLU's 57 subjects have from 100 to 1,534 items.
SUBJECTS = {f"mmlu_{i}": size for i, size in enumerate([100] * 12 + [150] * 12 + [200] * 12 + [250] * 10 + [350] * 6)}
SUBJECTS |= {"mmlu_52": 545, "mmlu_53": 612, "mmlu_54": 783, "mmlu_55": 895, "mmlu_56": 1180}
ITEMS = {
    120: {name: {name: 60} for name in ("a", "b")},
    1000: {name: {name: 250} for name in ("a", "b", "c", "d")},
    4000: {"arc": {"arc": 1172}, "gsm8k": {"gsm8k": 744}, "truthfulqa": {"truthfulqa": 817}, "wino": {"wino": 1267}},
    28632: {
        "arc": {"arc": 1172},
        "hellaswag": {"hellaswag": 10042},
        "mmlu": SUBJECTS,
        "truthfulqa": {"truthfulqa": 817},
        "wino": {"wino": 1267},
        "gsm8k": {"gsm8k": 1319},
    },
}
CURVES = ("flat", "gentle", "peaked", "slippage")
ACCURACIES = (0.45, 0.85, 0.63, 0.72, 0.78, 0.55)  # of the tasks, in the order above
STEEPNESS = 3.0  # of the probability of the right answer, per standard deviation of the items
REACH = 0.5  # of the range of weights: how far apart two weights are whose items' responses are correlated 0.61


@dataclass(frozen=True)
class Scenario:
    """A row of the table. disagreement: mean share of items on which two candidates of equal accuracy disagree."""

    items: int
    candidates: int
    curve: str
    disagreement: float


@dataclass(frozen=True)
class Result:
    """One race: points lost against the full grid's winner, the share of its items that was scored, and how many merges
    that took where none is kept: one for each candidate in each round."""

    lost: float
    share: float
    merges: int


# --- the model ------------------------------------------------------------------------------------


def responses(candidates: int) -> np.ndarray:
    """What turns independent normals into an item's responses to the weights, float32 (candidates, rank), rows of
    length 1.

    The kernel is so smooth that a few directions hold 99.99 % of it; drawing those alone is what makes this fast.
    """
    weights = np.linspace(0, 1, candidates)
    kernel = np.exp(-((weights[:, None] - weights) ** 2) / (2 * REACH**2))
    values, vectors = np.linalg.eigh(kernel)
    kept = values > 1e-4 * candidates
    root = vectors[:, kept] * np.sqrt(values[kept])
    return (root / np.linalg.norm(root, axis=1, keepdims=True)).astype(np.float32)


def latent(candidates: int, items: int, respond: float, rng: np.random.Generator) -> np.ndarray:
    """Standard normal, float32 (candidates, items): an item's difficulty and its response, `respond` of the
    variance."""
    root = responses(candidates) * np.float32(np.sqrt(respond))
    difficulty = rng.standard_normal(items, dtype=np.float32)
    return (
        root @ rng.standard_normal((root.shape[1], items), dtype=np.float32)
        + np.float32(np.sqrt(1 - respond)) * difficulty
    )


def strength(scenario: Scenario) -> float:
    """How much of an item's variance is its response, found by bisection on 100,000 items of middling accuracy."""
    first, second = np.triu_indices(scenario.candidates, 1)
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        right = latent(scenario.candidates, 100_000, middle, np.random.default_rng(1)) < ndtri(0.66)
        found = np.mean([np.mean(right[i] != right[j]) for i, j in zip(first, second, strict=True)])
        low, high = (middle, high) if found < scenario.disagreement else (low, middle)
    return low


def gains(scenario: Scenario, margin: float, best: float) -> np.ndarray:
    """Accuracy of each candidate beside the best weight's, (candidates,), where `best` in 0..1 is that weight."""
    weights = np.linspace(0, 1, scenario.candidates)
    if scenario.curve == "slippage":
        return np.where(np.arange(scenario.candidates) == round(best * (scenario.candidates - 1)), 0, -margin - 0.001)
    fall = {"flat": 0.0, "gentle": 0.024, "peaked": 0.06}[scenario.curve]
    return -fall * (weights - best) ** 2 / max(best, 1 - best) ** 2


def draw(race: Plan, limits: np.ndarray, respond: float, choose_by: str, rng: np.random.Generator) -> np.ndarray:
    """Values of all items, float32 (candidates, items), stratum after stratum. limits: (candidates, strata), normal
    quantiles.

    score: 0 or 1. gold: the log-probability of the right answer, a logistic function of how far the item is from its
    limit.
    """
    ahead = np.repeat(limits.astype(np.float32), race.sizes, axis=1)
    ahead -= latent(len(limits), int(race.sizes.sum()), respond, rng)
    return (ahead > 0).astype(np.float32) if choose_by == "score" else -np.log1p(np.exp(-STEEPNESS * ahead))


# --- races ----------------------------------------------------------------------------------------


def one_race(race: Plan, values: np.ndarray) -> tuple[int, float, int]:
    """(winner, share of the full grid's items, merges): items of a stratum are alike, so the first are as good as
    random."""
    starts = np.concatenate([[0], np.cumsum(race.sizes)[:-1]])
    racing, scored, merges = list(range(len(values))), 0, 0
    for number, counts in enumerate(race.counts):
        before = race.counts[number - 1] if number else np.zeros_like(counts)
        scored, merges = scored + len(racing) * int((counts - before).sum()), merges + len(racing)
        columns = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
        leader, dropped = decide(race, number, [str(i) for i in racing], values[np.ix_(racing, columns)])
        racing = [i for i in racing if str(i) not in {drop.candidate for drop in dropped}]
        if len(racing) == 1:
            break
    return int(leader), scored / values.size, merges


def simulate(
    scenario: Scenario, margin: float, choose_by: str, races: int, seed: int, first=FIRST_ROUND
) -> list[Result]:
    """Races of one row, each on items of its own. first: items that the first round has at least."""
    rng = np.random.default_rng([seed, scenario.items, scenario.candidates, CURVES.index(scenario.curve)])
    race = plan(strata_of(ITEMS[scenario.items]), [str(i) for i in range(scenario.candidates)], margin, seed, first)
    entries = list(dict.fromkeys(stratum.entry for stratum in race.strata))
    accuracy = np.array([ACCURACIES[entries.index(stratum.entry)] for stratum in race.strata])
    respond, results = strength(scenario), []
    starts = np.concatenate([[0], np.cumsum(race.sizes)[:-1]])
    for _ in range(races):
        limits = ndtri(accuracy + gains(scenario, margin, rng.random())[:, None])
        values = draw(race, limits, respond, choose_by, rng)
        scores = np.add.reduceat(values, starts, axis=1, dtype=np.float64) @ (race.weights / race.sizes)
        winner, share, merges = one_race(race, values)
        results.append(Result(float(scores.max() - scores[winner]), share, merges))
    return results


def row(scenario: Scenario, results: list[Result], margin: float) -> dict:
    """The figures of a row, shares in 0..1, losses in points."""
    lost = np.array([result.lost for result in results])
    share = np.array([result.share for result in results])
    return asdict(scenario) | {
        "kept": round(float(np.mean(lost <= margin + 1e-12)), 4),
        "same": round(float(np.mean(lost <= 1e-12)), 4),
        "mean_lost": round(float(100 * lost.mean()), 4),
        "share": round(float(share.mean()), 4),
        "share_p90": round(float(np.quantile(share, 0.9)), 4),
        "merges": round(float(np.mean([result.merges for result in results])), 1),
    }


# --- table ----------------------------------------------------------------------------------------

COLUMNS = ("items", "candidates", "λ curve", "disagree", "lost ≤ margin", "same winner", "lost, mean (points)")
COLUMNS += ("items scored", "nine in ten below", "merges")
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def line(r: dict) -> str:
    figures = (
        f"{r['kept']:.1%} | {r['same']:.0%} | {r['mean_lost']:.3f} | {r['share']:.2f} | {r['share_p90']:.2f} | "
        f"{r['merges']:.1f}"
    )
    return f"| {r['items']:,} | {r['candidates']} | {r['curve']} | {r['disagreement']:.0%} | {figures} |"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=positive_int, default=200, help="races per row (200)")
    parser.add_argument("--margin", type=float, default=0.5, help="points that a winner may lose (0.5)")
    parser.add_argument("--choose_by", choices=("score", "gold"), default="score", help="the values raced on (score)")
    parser.add_argument("--items", type=int, nargs="+", choices=ITEMS, default=list(ITEMS), help="items of all tasks")
    parser.add_argument("--candidates", type=int, nargs="+", default=[6, 12], help="weights on the grid (6 12)")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES), help="accuracy over λ (all)")
    parser.add_argument("--disagreement", type=float, nargs="+", default=[0.02, 0.05, 0.12], help="0.02 0.05 0.12")
    parser.add_argument(
        "--first_round", type=positive_int, default=FIRST_ROUND, help="items that it has at least (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    start, rows = time.perf_counter(), []
    print(HEAD, flush=True)
    for choice in product(args.items, args.candidates, args.curves, args.disagreement):
        scenario = Scenario(*choice)
        results = simulate(scenario, args.margin / 100, args.choose_by, args.races, args.seed, args.first_round)
        rows.append(row(scenario, results, args.margin / 100))
        print(line(rows[-1]), flush=True)
    seconds = round(time.perf_counter() - start, 1)
    print(
        json.dumps(
            {"races": args.races, "margin": args.margin, "choose_by": args.choose_by, "seconds": seconds, "rows": rows}
        )
    )


if __name__ == "__main__":
    run(main)
