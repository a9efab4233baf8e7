"""Races: which items, who drops out, when it ends, what is said; and the simulation that says what a race is worth."""

import itertools
import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from benchmarks import simulate_race
from common.errors import DataError
from merge_and_evaluate import race as races
from merge_and_evaluate import race_plan
from merge_and_evaluate.race import Drop, Step, decide, estimate, next_step, outcome, spent, unscored, why_dropped
from merge_and_evaluate.race_plan import FIRST_ROUND, ROUNDS, Cost, Stratum, most, share_out, strata_of

TREE = {"arc": {"arc": 60}, "mmlu": {"law": 40, "art": 7, "sky": 1}, "wino": {"wino": 90}}
NAMES = ("0.6", "0.9", "1.2")
plan = partial(race_plan.plan, first_round=1)  # all five rounds, however few the items


def grid(race, seed: int, accuracies: tuple[float, ...], disagree: float = 0.1) -> dict[str, dict[str, np.ndarray]]:
    """0/1 values of every candidate on every item, candidates alike but on `disagree` of the items."""
    rng = np.random.default_rng(seed)
    common = {s.name: rng.random(s.items) for s in race.strata}
    out = {}
    for name, accuracy in zip(race.candidates, accuracies, strict=True):
        out[name] = {
            s.name: np.where(rng.random(s.items) < disagree, rng.random(s.items), common[s.name]) < accuracy
            for s in race.strata
        }
    return {name: {task: values.astype(float) for task, values in tasks.items()} for name, tasks in out.items()}


def run(race, full, scored=None) -> tuple[Step, dict, list]:
    """Race to the end: (outcome, what was scored, every (candidate, task, item) that was asked for)."""
    scored = scored or {name: unscored(race) for name in race.candidates}
    asked = []
    while (step := next_step(race, scored)).to_score:
        for name, tasks in step.to_score.items():
            for task, items in tasks.items():
                asked += [(name, task, int(i)) for i in items]
                scored[name][task][items] = full[name][task][items]
    return step, scored, asked


def mean_score(race, values: dict[str, np.ndarray]) -> float:
    """The score of the full grid, by loops: rows count the same, a row is the plain mean of its strata."""
    rows = {}
    for s in race.strata:
        rows.setdefault(s.entry, []).append(sum(values[s.name]) / s.items)
    return sum(sum(means) / len(means) for means in rows.values()) / len(rows)


# --- plan -----------------------------------------------------------------------------------------


def test_strata_share_the_weight_of_their_row():
    strata = strata_of({"arc": {"arc": 8}, "mmlu": {"law": 4, "art": 2}}, requests={"law": 4}, costs={"arc": 2.5})
    assert strata == (
        Stratum("arc", "arc", 8, 0.5, 1, 2.5),
        Stratum("law", "mmlu", 4, 0.25, 4, 1.0),
        Stratum("art", "mmlu", 2, 0.25, 1, 1.0),
    )


def test_items_are_shared_out_by_weight_as_far_as_there_are_any():
    assert share_out(strata_of({"a": {"a": 1000}, "b": {"b": 60}}), 0.5).tolist() == [470, 60]
    assert share_out(strata_of({"a": {"a": 1000}, "b": {"b": 1000}}), 0.25).tolist() == [250, 250]
    dear = strata_of({"a": {"a": 1000}, "b": {"b": 1000}}, costs={"b": 4.0})
    # 333 + 4·166 = 997 of the 1,000 that a fifth may cost: half the items at four times the cost.
    assert share_out(dear, 0.2).tolist() == [333, 166]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    costs=st.lists(st.sampled_from([0.5, 1.0, 7.0]), min_size=8, max_size=8),
    seed=st.integers(0, 5),
)
def test_rounds_are_nested_cost_no_more_than_their_part_and_end_with_all_items(sizes, costs, seed):
    tree = {f"row{i % 3}": {} for i in range(len(sizes))}
    for i, size in enumerate(sizes):
        tree[f"row{i % 3}"][f"task{i}"] = size
    race = plan(strata_of(tree, costs={f"task{i}": c for i, c in enumerate(costs)}), NAMES, 0.005, seed)
    assert race.weights.sum() == pytest.approx(1)
    assert race.counts.shape == (len(ROUNDS), len(sizes))
    assert (race.counts >= 1).all() and (np.diff(race.counts, axis=0) >= 0).all()
    assert (race.counts[-1] == race.sizes).all()
    price = np.array([s.cost for s in race.strata])
    for part, counts in zip(ROUNDS, race.counts, strict=True):
        assert counts @ price <= max(part * (race.sizes @ price), price.sum()) + 1e-9
    for stratum, order in zip(race.strata, race.order, strict=True):
        assert sorted(order.tolist()) == list(range(stratum.items))


@pytest.mark.parametrize(
    ("sizes", "rounds"),
    [((20,), [20]), ((59, 1), [60]), ((60, 60), [60, 120]), ((320, 292), [76, 152, 306, 612]), ((1000,), 5)],
)
def test_a_first_round_is_not_so_small_that_it_costs_merges_and_drops_nobody(sizes, rounds):
    tree = {f"task{i}": {f"task{i}": size} for i, size in enumerate(sizes)}
    totals = race_plan.plan(strata_of(tree), NAMES, 0.005, 0).counts.sum(axis=1).tolist()
    assert totals[0] >= min(FIRST_ROUND, sum(sizes)) and totals[-1] == sum(sizes)
    assert totals == rounds or len(totals) == rounds


def test_the_draw_depends_on_seed_and_task_alone():
    one = plan(strata_of({"arc": {"arc": 60}, "wino": {"wino": 60}}), NAMES, 0.005, 3)
    other = plan(strata_of({"wino": {"wino": 60}}), ("x", "y"), 0.1, 3)
    assert one.order[1].tolist() == other.order[0].tolist() != one.order[0].tolist()
    assert plan(strata_of({"wino": {"wino": 60}}), NAMES, 0.1, 4).order[0].tolist() != other.order[0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ("0.6",)}, "a race needs two candidates or more and got 1: give more weights or recipes"),
        ({"candidates": ("a", "b", "a")}, "candidate 'a' is in the race twice: name each candidate once"),
        ({"margin": -0.1}, "the margin of the race is -0.1; needed: a finite number, 0 or more"),
        ({"margin": math.nan}, "the margin of the race is nan; needed: a finite number, 0 or more"),
        ({"strata": ()}, "a race needs tasks to score on and got none: name them with --choose_on"),
        ({"strata": strata_of({"a": {"x": 3}, "b": {"x": 3}})}, "task 'x' is in the race twice: name each task once"),
        (
            {"strata": strata_of({"a": {"a": 0}})},
            "task 'a' has 0 items; a race needs at least one: leave the task out",
        ),
        (
            {"strata": (Stratum("a", "a", 3, math.inf),)},
            "task 'a' has weight inf in the race; needed: a finite number above 0",
        ),
        (
            {"strata": (Stratum("a", "a", 3, 1.0, cost=0.0),)},
            "task 'a' has cost 0.0 in the race; needed: a finite number above 0",
        ),
    ],
)
def test_what_is_no_race_is_refused(change, message):
    given_ = {"strata": strata_of(TREE), "candidates": NAMES, "margin": 0.005, "seed": 0} | change
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        plan(**given_)


# --- statistics -----------------------------------------------------------------------------------


def slow_compare(race, number, differences):
    """estimate() by loops, from the formulas."""
    counts, out = race.counts[number], []
    rows = list(dict.fromkeys(s.entry for s in race.strata))
    for of_one in differences:
        parts, at = {}, 0
        for s, count in zip(race.strata, counts, strict=True):
            parts[s.name] = list(of_one[at : at + count])
            at += count
        largest = max(abs(float(d)) for row in differences for d in row)
        mean = sum(s.weight * sum(parts[s.name]) / len(parts[s.name]) for s in race.strata)
        here = everywhere = 0.0
        for row in rows:
            members = [s for s in race.strata if s.entry == row]
            values = [d for s in members for d in parts[s.name]]
            middle = sum(values) / len(values)
            extra = races.PSEUDO_ITEMS / len(rows)
            variance = sum((d - middle) ** 2 for d in values) + extra * largest**2
            variance /= len(values) - 1 + extra
            for s in members:
                n = len(parts[s.name])
                everywhere += s.weight**2 * variance / n
                here += s.weight**2 * variance / n * (1 - n / s.items)
        out.append((mean, math.sqrt(here), math.sqrt(everywhere)))
    return np.array(out).T


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(0, 4), real=st.booleans())
def test_differences_and_their_errors_are_those_of_the_formulas(seed, number, real):
    race = plan(strata_of(TREE), NAMES, 0.005, 0)
    rng = np.random.default_rng(seed)
    shape = (3, int(race.counts[number].sum()))
    values = rng.normal(size=shape) if real else rng.integers(0, 2, shape).astype(float)
    mean, stderr, stderr_new, freedom = estimate(race, number, values - values[0])
    np.testing.assert_allclose((mean, stderr, stderr_new), slow_compare(race, number, values - values[0]), atol=1e-12)
    assert freedom == race.counts[number].sum() - 3  # one for each row
    assert number < 4 or (stderr == 0).all()


def test_error_is_spent_as_o_brien_and_fleming_do():
    # Lan and DeMets' function at quarters: cumulative two-sided 0.05, as printed in textbooks.
    assert [round(spent(0.05, k / 4), 5) for k in range(5)] == [0.0, 0.00009, 0.00557, 0.02363, 0.05]
    assert races._width(3, 4, 0.05, 10**6) == pytest.approx(1.937, abs=0.001)  # the last quarter's 0.02638, alone
    assert races._width(4, 4, 0.05, 10**6) == 0


def test_the_stated_error_is_the_error_of_estimating_all_items_from_those_drawn():
    race = plan(strata_of({"a": {"a": 300}, "b": {"x": 120, "y": 400}}), NAMES[:2], 0.005, 0)
    full = grid(race, 5, (0.6, 0.6), disagree=0.3)
    names = race.candidates
    truth = mean_score(race, full["0.9"]) - mean_score(race, full["0.6"])
    errors, stated, rng = [], [], np.random.default_rng(0)
    for _ in range(600):
        drawn = replace(race, order=tuple(rng.permutation(s.items) for s in race.strata))
        values = races._gather(drawn, 3, [full[name] for name in names])
        mean, stderr, _, _ = estimate(drawn, 3, values - values[0])
        errors.append(mean[1] - truth)
        stated.append(stderr[1])
    assert np.mean(errors) == pytest.approx(0, abs=4 * np.std(errors) / math.sqrt(600))
    assert np.std(errors) == pytest.approx(np.mean(stated), rel=0.1)


def test_agreement_so_far_drops_nobody_before_all_items_are_scored():
    race = plan(strata_of(TREE), NAMES, 0.005, 0)
    for number in range(4):
        leader, dropped = decide(race, number, NAMES, np.ones((3, int(race.counts[number].sum()))))
        assert (leader, dropped) == ("0.6", ())
    leader, dropped = decide(race, 4, NAMES, np.ones((3, 198)))
    assert (leader, [d.candidate for d in dropped]) == ("0.6", ["0.9", "1.2"])
    assert not any(d.worse for d in dropped)


def test_candidates_that_happen_to_agree_in_one_round_have_a_bound_that_is_wide():
    race = plan(strata_of({"a": {"a": 4000}}), NAMES, 0.005, 0)
    values = np.ones((3, 250))
    values[2, :100] = 0  # the third is far behind; between the first two no difference has been seen
    _, dropped = decide(race, 0, NAMES, values)
    assert [d.candidate for d in dropped] == ["1.2"]
    assert dropped[0].worse


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), number=st.integers(0, 4), gap=st.floats(0, 0.6))
def test_bounds_are_on_the_far_side_of_what_was_seen(seed, number, gap):
    race = plan(strata_of(TREE), NAMES, 1e9, 0)
    values = races._gather(race, number, list(grid(race, seed, (0.9, 0.9 - gap, 0.9 - gap / 2)).values()))
    _, dropped = decide(race, number, NAMES, values)
    for drop in dropped:
        assert not drop.worse or drop.difference < 0
        assert drop.stderr <= drop.stderr_new
        assert drop.bound >= drop.difference


def test_equals_are_seldom_called_worse_and_clear_losers_are_from_the_first_round():
    """Six candidates: of 400 races of equals at most 5 % call anyone worse, and one that is 20 points behind is called
    so."""
    names = tuple("abcdef")
    race = plan(strata_of({"x": {"x": 2000}}), names, 0.005, 0)
    draw, wrong, right = np.random.default_rng(0), 0, 0
    for _ in range(400):
        hard = draw.random(2000)  # shared by all, so that they agree on most items
        values = np.array([(hard + 0.2 * draw.standard_normal(2000) < 0.7) for _ in names], float)
        values[5] *= draw.random(2000) < 0.7
        scored = {name: {"x": of_one} for name, of_one in zip(names, values, strict=True)}
        worse = {drop.candidate for drop in next_step(race, scored).dropped if drop.worse}
        wrong += bool(worse - {"f"})
        right += "f" in worse
    assert wrong <= 0.05 * 400 and right >= 0.9 * 400


@pytest.mark.parametrize("number", range(4))
def test_the_bound_is_spent_over_the_rounds_that_can_err_and_worse_evenly_over_all_and_all_pairs(number):
    race = plan(strata_of(TREE), NAMES, 1e9, 0)
    values = races._gather(race, number, list(grid(race, 1, (0.9, 0.3, 0.1)).values()))
    leader, dropped = decide(race, number, NAMES, values)
    _, _, _, freedom = estimate(race, number, values - values[0])
    assert (leader, [d.candidate for d in dropped]) == ("0.6", ["0.9", "1.2"])
    spend = [spent(0.05, (number + 1) / 4) - spent(0.05, number / 4), 0.05 / 6 / 5]  # six ordered pairs, five rounds
    wide, wider = (student.isf(s, freedom) for s in spend)
    for drop in dropped:
        assert drop.bound == pytest.approx(drop.difference + wide * drop.stderr)
        assert drop.worse == (drop.difference + wider * drop.stderr_new < 0)


def test_strata_of_one_row_are_put_side_by_side():
    """Variances are pooled over a row's strata, which are taken for neighbours."""
    law, arc, art = Stratum("law", "mmlu", 9, 0.25), Stratum("arc", "arc", 9, 0.5), Stratum("art", "mmlu", 9, 0.25)
    assert plan((law, arc, art), NAMES, 0.005, 0).strata == (law, art, arc)


# --- the state ------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.floats(0, 1), gap=st.floats(0, 0.5))
def test_a_race_that_was_interrupted_asks_for_the_rest_and_ends_the_same(seed, cut, gap):
    race = plan(strata_of(TREE), NAMES, 0.005, seed)
    full = grid(race, seed, (0.8, 0.8 - gap, 0.7))
    end, scored, asked = run(race, full)
    assert len(set(asked)) == len(asked)  # nothing is scored twice
    assert len(end.racing) == 1 and end.racing[0] == end.leader
    assert sorted([end.leader, *(d.candidate for d in end.dropped)]) == sorted(NAMES)
    kept = asked[: int(cut * len(asked))]
    partial = {name: unscored(race) for name in NAMES}
    for name, task, item in kept:
        partial[name][task][item] = full[name][task][item]
    again, rescored, asked_again = run(race, full, partial)
    assert (again.leader, again.dropped, again.round) == (end.leader, end.dropped, end.round)
    assert sorted(kept + asked_again) == sorted(asked)
    for name, task in itertools.product(NAMES, scored[NAMES[0]]):
        np.testing.assert_array_equal(scored[name][task], rescored[name][task])


def test_a_race_scores_the_same_growing_items_of_all_and_stops_for_those_who_left():
    race = plan(strata_of({"a": {"a": 800}, "b": {"b": 800}}, requests={"a": 4}), NAMES, 0.005, 1)
    full = grid(race, 2, (0.8, 0.79, 0.2))
    scored = {name: unscored(race) for name in NAMES}
    first = next_step(race, scored)
    assert (first.round, first.leader, first.dropped, first.racing) == (0, None, (), NAMES)
    for task in ("a", "b"):
        items = [first.to_score[name][task].tolist() for name in NAMES]
        assert items[0] == items[1] == items[2] == sorted(items[0])
        assert len(items[0]) == 50
    for name in NAMES:
        for task, items in first.to_score[name].items():
            scored[name][task][items] = full[name][task][items]
    second = next_step(race, scored)
    assert [d.candidate for d in second.dropped] == ["1.2"]
    assert list(second.to_score) == ["0.6", "0.9"]
    assert not set(first.to_score["0.6"]["a"]) & set(second.to_score["0.6"]["a"])
    assert most(race) == Cost(scorings=15, items=4800, requests=12_000)
    end, scored, asked = run(race, full, scored)
    assert sum(np.isfinite(values).sum() for tasks in scored.values() for values in tasks.values()) == 300 + len(asked)


def test_scored_to_the_end_the_winner_is_the_full_grids():
    """With no margin and candidates that differ by little, most races go on to the end, where nothing can err."""
    race, ends = plan(strata_of(TREE), NAMES, 0.0, 0), 0
    for seed in range(40):
        full = grid(race, seed, (0.7, 0.7, 0.7), disagree=0.2)
        end, _, _ = run(race, full)
        if end.round == 4:
            ends += 1
            assert mean_score(race, full[end.leader]) == pytest.approx(max(mean_score(race, full[n]) for n in NAMES))
    assert ends > 20


def test_tasks_count_the_same_whatever_their_sizes():
    race = plan(strata_of({"big": {"big": 900}, "small": {"s1": 30, "s2": 30}}), ("big", "small"), 0.0, 0)
    full = {"big": unscored(race), "small": unscored(race)}
    for s in race.strata:
        right = np.arange(s.items) % 2 == 0
        full["big"][s.name] = right.astype(float)
        full["small"][s.name] = right.astype(float)
    full["big"]["big"][1:19:2] = 1  # + 9 of 900: a point of a task that counts half
    full["small"]["s1"][1:3:2] = 1  # + 1 of 30: 3.3 points of one that counts a quarter
    end, _, _ = run(race, full)
    assert end.leader == "small"


def test_values_nobody_asked_for_are_not_looked_at_yet():
    race = plan(strata_of({"a": {"a": 64}}), NAMES, 0.005, 0)
    scored = {name: unscored(race) for name in NAMES}
    later = race.order[0][race.counts[0][0] :]
    for name in NAMES:
        scored[name]["a"][later] = 1.0
    step = next_step(race, scored)
    assert step.round == 0
    assert step.to_score["0.6"]["a"].tolist() == sorted(race.sample(0)[0].tolist())


def test_infinite_values_and_missing_items_are_refused():
    race = plan(strata_of({"a": {"a": 64}}), NAMES, 0.005, 0)
    scored = {name: unscored(race) for name in NAMES}
    item = int(race.order[0][0])
    scored["0.9"]["a"][item] = -math.inf
    message = (
        f"candidate '0.9': task 'a' has an infinite value at item {item}; a race needs finite ones: "
        "look at this model's outputs"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        next_step(race, scored)
    scored["0.9"]["a"] = np.full(60, np.nan)
    message = "candidate '0.9': task 'a' has values of shape (60,) in the race; needed: one for each of its 64 items"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        next_step(race, scored)


# --- what is said ---------------------------------------------------------------------------------


def test_what_is_said():
    race = plan(strata_of({"a": {"a": 16_000}}), ("0.6", "0.9", "1.2"), 0.005, 0)
    drop = Drop("0.6", "0.9", 1, -0.0312, 0.01, 0.0105, -0.002, True)
    assert why_dropped(race, drop, "points") == (
        "0.6 drops out after 2,000 of 16,000 items: worse, 3.12 ± 1.05 points behind 0.9"
    )
    near = replace(drop, difference=-0.001, bound=0.0041, worse=False)
    assert why_dropped(race, near, "points") == (
        "0.6 drops out after 2,000 of 16,000 items: 0.10 ± 1.05 points behind 0.9, and at most 0.41 better (margin 0.5)"
    )
    assert why_dropped(race, replace(near, bound=-0.0001), "points").endswith(
        "points behind 0.9, and not better on all of them (95 %)"
    )
    last = replace(near, round=4, stderr=0.0, bound=-0.001)
    assert (
        why_dropped(race, last, "points")
        == "0.6 drops out after 16,000 of 16,000 items: 0.10 ± 1.05 points behind 0.9, on all items"
    )
    step = Step(1, ("0.9",), "0.9", (drop, replace(near, candidate="1.2")), {})
    assert outcome(race, step, "points").splitlines() == [
        "0.9 wins after 2,000 of 16,000 items",
        "- worse, on new items too (95 %, over all pairs): 0.6",
        "- behind, though new items might say otherwise, in points: 1.2 by 0.10 ± 1.05",
    ]
    others = (replace(near, candidate="1.2", leader="0.6", difference=-0.02), replace(near, candidate="0.6"))
    assert outcome(race, replace(step, dropped=others), "hundredths of a nat").splitlines()[1:] == [
        "- behind, though new items might say otherwise, in hundredths of a nat: "
        "0.6 by 0.10 ± 1.05, 1.2 by 2.00 ± 1.05 (behind 0.6)"  # the nearest first
    ]
    assert outcome(race, replace(step, dropped=(drop,)), "points").count("\n") == 1


# --- the simulation -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_promise_holds_in_the_hardest_case_and_saves_most_items_where_weights_matter():
    for scenario, most_scored in (
        (simulate_race.Scenario(4000, 6, "slippage", 0.02), 0.4),
        (simulate_race.Scenario(28632, 6, "peaked", 0.05), 0.25),
    ):
        results = simulate_race.simulate(scenario, 0.005, "score", 120, seed=3)
        row = simulate_race.row(scenario, results, 0.005)
        assert row["kept"] >= 0.95
        assert row["share"] <= most_scored


def test_simulated_races_decide_as_next_step_does():
    tree = simulate_race.ITEMS[1000]
    race = plan(strata_of(tree), NAMES, 0.005, 0)
    rng = np.random.default_rng(4)
    limits = np.array([[0.8], [0.6], [0.3]]) * np.ones(4)
    values = simulate_race.draw(race, limits, 0.05, "score", rng)
    winner, share, merges = simulate_race.one_race(race, values)
    starts = np.concatenate([[0], np.cumsum(race.sizes)])
    full = {name: {s.name: np.empty(s.items) for s in race.strata} for name in NAMES}
    for i, name in enumerate(NAMES):
        for s, order, a, b in zip(race.strata, race.order, starts[:-1], starts[1:], strict=True):
            full[name][s.name][order] = values[i, a:b]
    end, _, asked = run(race, full)
    assert NAMES[winner] == end.leader
    assert share == len(asked) / values.size < 1


def test_candidates_disagree_as_much_as_the_scenario_says():
    scenario = simulate_race.Scenario(28632, 6, "flat", 0.05)
    respond = simulate_race.strength(scenario)
    race = plan(strata_of(simulate_race.ITEMS[28632]), [str(i) for i in range(6)], 0.005, 0)
    limits = np.full((6, len(race.strata)), 0.41)
    values = simulate_race.draw(race, limits, respond, "score", np.random.default_rng(0))
    pairs = list(itertools.combinations(range(6), 2))
    found = [np.mean(values[i] != values[j]) for i, j in pairs]
    assert np.mean(found) == pytest.approx(0.05, abs=0.003)
    assert found[pairs.index((0, 1))] < found[pairs.index((0, 5))]
    assert values.mean() == pytest.approx(0.659, abs=0.02)


@pytest.mark.slow
def test_the_simulation_prints_a_table_and_ends_with_json(capsys):
    simulate_race.main(["--races", "2", "--items", "1000", "--candidates", "3", "--curves", "flat", "peaked"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| items | candidates |") and len(lines) == 2 + 6 + 1
    document = json.loads(lines[-1])
    assert document["races"] == 2 and len(document["rows"]) == 6
    assert {row["curve"] for row in document["rows"]} == {"flat", "peaked"}
