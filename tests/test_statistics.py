"""Paired statistics against cases worked by hand, slow obvious oracles, and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_and_evaluate import statistics
from merge_and_evaluate.statistics import Difference


def test_paired_difference_by_hand():
    """d = 1, 1, 0, 0: mean 1/2, sd √(1/3), so ± √(1/3)/2; two discordant items, both up: p = 2 · (1/2)² = 1/2."""
    found = statistics.paired_difference([0, 0, 1, 1], [1, 1, 1, 1])
    assert found == Difference(0.5, pytest.approx(math.sqrt(1 / 3) / 2), 0.5, 4, True)


def test_paired_t_by_hand():
    """d = 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t = 0.2/(0.1/√3) = 2√3; with 2 degrees of freedom p = 1 − t/√(t² + 2)."""
    found = statistics.paired_difference([0.5, 0.5, 0.5], [0.6, 0.7, 0.8])
    t = 2 * math.sqrt(3)
    assert found.value == pytest.approx(0.2) and found.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))


def exact_sign_test(better: int, worse: int) -> float:
    """Every way the discordant items could have fallen, counted."""
    n, far = better + worse, abs(better - worse)
    ways = [abs(sum(way)) >= far for way in itertools.product((1, -1), repeat=n)]
    return sum(ways) / len(ways)


@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_counts_every_way(better, worse):
    assert statistics.mcnemar(better, worse) == pytest.approx(exact_sign_test(better, worse))


@given(st.lists(st.sampled_from([0, 1, 0.25]), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_a_row_does_not_differ_from_itself_and_differences_turn_round(values, random):
    same = statistics.paired_difference(values, values)
    assert (same.value, same.stderr, same.p) == (0, 0, 1)
    other = random.sample(values, len(values))
    there, back = statistics.paired_difference(values, other), statistics.paired_difference(other, values)
    assert there.value == pytest.approx(-back.value) and there.p == pytest.approx(back.p)
    assert there.stderr == pytest.approx(back.stderr)


def test_mean_of_tasks_by_hand():
    """Tasks count once each, whatever their size: (0.02 − 0.01)/2, √(0.03² + 0.04²)/2 = 0.025; z = 0.2."""
    parts = [Difference(0.02, 0.03, 0.5, 100), Difference(-0.01, 0.04, 0.8, 10_000)]
    found = statistics.mean_difference(parts)
    assert found.value == pytest.approx(0.005) and found.stderr == pytest.approx(0.025) and found.items == 10_100
    assert found.p == pytest.approx(math.erfc(0.2 / math.sqrt(2)))
    assert statistics.mean_difference(parts[:1]) is parts[0]
    assert statistics.mean_difference([*parts, Difference(0.1, None, None, 1)]).p is None


def test_all_items_alike_are_no_certainty():
    """Three items, all better: no spread, but three heads in a row are p = 1/4, in one task or in three."""
    one = statistics.paired_difference([0, 0, 0], [1, 1, 1])
    assert (one.value, one.stderr, one.p) == (1, 0, 0.25)
    assert statistics.mean_difference([one, one]).p == 2 / 2**6
    assert statistics.paired_difference([0.5] * 3, [0.75] * 3).p == 0.25


def test_unpaired_by_hand():
    found = statistics.unpaired_difference((0.5, 0.03), (0.6, 0.04), 100)
    assert found.value == pytest.approx(0.1) and found.stderr == pytest.approx(0.05) and not found.paired
    assert found.p == pytest.approx(math.erfc(2 / math.sqrt(2)))
    assert statistics.unpaired_difference((0.5, None), (0.6, 0.04), 100).p is None


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, None, 0.01]) == [0.5, None, 0.02]
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_items_needed_by_hand():
    """(1.95996 + 0.84162)² = 7.8489: a difference of one standard error on 100 items takes 785."""
    assert statistics.items_needed(Difference(0.02, 0.02, 0.3, 100)) == 785
    assert statistics.items_needed(Difference(0.0, 0.02, 1.0, 100)) is None


def simulated(pairs: int, items: int, difference: float, seed: int) -> list[Difference]:
    """`pairs` comparisons of two models on two tasks: 70 % right, 20 % of items fall differently, the second model
    better by `difference`."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(pairs):
        parts = []
        for _task in range(2):
            fall = random.random(items)
            up, down = 0.1 + difference / 2, 0.1 - difference / 2
            first = np.where(fall < up, 0, np.where(fall < up + down, 1, random.random(items) < 0.7))
            second = np.where(fall < up, 1, np.where(fall < up + down, 0, first))
            parts.append(statistics.paired_difference(first, second))
        found.append(statistics.mean_difference(parts))
    return found


def share_called_different(found: list[Difference]) -> float:
    return float(np.mean([difference.p < statistics.LEVEL for difference in found]))


@pytest.mark.slow
def test_of_a_thousand_pairs_without_a_difference_few_are_called_different():
    """5 % and no more than what a thousand draws may add (three standard errors of a share of 0.05: 2.1 points)."""
    assert share_called_different(simulated(1000, 200, 0.0, seed=1)) <= 0.05 + 0.021


@pytest.mark.slow
def test_the_promised_power():
    """With as many items as items_needed asks for, 80 % of real differences are seen (± 3 standard errors)."""
    difference, trial = 0.03, 400
    spread = math.sqrt(0.2 - difference**2)  # of one item's d: 20 % discordant
    known = Difference(difference, spread / math.sqrt(2 * trial), None, 2 * trial)
    needed = statistics.items_needed(known)
    found = simulated(1000, round(needed / 2), difference, seed=2)
    assert share_called_different(found) == pytest.approx(0.8, abs=0.04)
    assert np.mean([d.value for d in found]) == pytest.approx(difference, abs=0.002)
    assert np.std([d.value for d in found]) == pytest.approx(np.mean([d.stderr for d in found]), rel=0.08)


def part_of(better: int, worse: int, alike: int) -> Difference:
    """A task's difference, of 0/1 items of which so many are better, worse, and alike."""
    first = [0] * better + [1] * worse + [1] * alike
    return statistics.paired_difference(first, [1] * better + [0] * worse + [1] * alike)


@pytest.mark.parametrize(
    "parts, exact",
    [
        ([(5, 0, 0), (20, 20, 160)], 0.0625),  # a task of five items, all better, beside one that says nothing
        ([(2, 0, 0), (1, 0, 1)] + [(0, 0, 2)] * 55, 0.25),  # MMLU's subjects, two items each: three are better
        ([(1, 0, 1)] * 5 + [(0, 0, 2)] * 52, 0.0625),
        ([(0, 0, 300), (1, 0, 1), (0, 0, 2), (2, 0, 0)], 0.25),
    ],
)
def test_parts_without_spread_prove_no_more_than_their_items(parts, exact):
    """An exact test over the items that differ says p `exact`; the mean says nothing surer, and no verdict."""
    found = statistics.mean_difference([part_of(*part) for part in parts])
    assert found.p > statistics.LEVEL and found.p > 0.8 * exact
    assert found.p == pytest.approx(statistics.normal_p(found.value, found.stderr))
    turned = statistics.mean_difference([part_of(worse, better, alike) for better, worse, alike in parts])
    assert (turned.value, turned.stderr, turned.p) == (-found.value, found.stderr, found.p)


def test_a_part_without_spread_by_hand():
    """Five of five better: p 1/16, which is 1.8627 standard errors of the normal distribution, so 1 ± 1/1.8627."""
    found = statistics.mean_difference([part_of(5, 0, 0), part_of(20, 20, 160)])
    other = part_of(20, 20, 160).stderr
    assert found.value == 0.5 and found.stderr == pytest.approx(math.hypot(1 / 1.862732, other) / 2, rel=1e-6)


def test_differences_alike_but_for_rounding_have_no_spread():
    """0.6 - 0.5 and 0.7 - 0.6 differ in the last bit: no spread to divide by."""
    found = statistics.paired_difference([0.5, 0.6, 0.7], [0.6, 0.7, 0.8])
    assert (found.stderr, found.p) == (0, 0.25)
    assert statistics.mean_difference([found, Difference(0.0, 0.1, 1.0, 50)]).p > 0.25


def test_scores_without_spread_on_other_items_are_no_certainty():
    """None of three right, and three of three others."""
    assert statistics.unpaired_difference((0.0, 0.0), (1.0, 0.0), 3).p == 0.25
    assert statistics.unpaired_difference((1.0, 0.0), (1.0, 0.0), 3).p == 1


def test_differences_that_cancel_are_none():
    """0.1 + 0.2 - 0.3 is 2.8e-17 in floats: not a difference to look for with more items."""
    parts = [Difference(value, 0.05, 0.1, 100) for value in (0.1, 0.2, -0.3)]
    assert statistics.items_needed(statistics.mean_difference(parts)) is None
