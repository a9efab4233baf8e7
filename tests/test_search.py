"""The search for weights: what it proposes, when it ends, what it refuses."""

import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from mergekit.config import evaluate_setting

from common.errors import DataError
from merge_and_evaluate import search as searching
from merge_and_evaluate.search import Search, Trial, best, per_layer, propose

SEARCH = Search(dimensions=2, evaluations=300, seed=0)


def quadratic(weights, at=(1.3, 0.7)) -> float:
    return -sum((w - a) ** 2 for w, a in zip(weights, at, strict=True))


def run(search, objective=quadratic, trials=()):
    """(every trial, every proposal), in order."""
    trials, proposals = list(trials), []
    while (proposal := propose(search, trials)).candidates:
        proposals.append(proposal)
        trials += [Trial(weights, objective(weights)) for weights in proposal.candidates]
    return trials, [*proposals, proposal]


def refused(message: str):
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_a_quadratic_is_found(seed):
    trials, proposals = run(replace(SEARCH, seed=seed))
    assert best(trials).weights == pytest.approx((1.3, 0.7), abs=0.03)
    assert len(trials) < 180
    assert proposals[-1].ended == "no rise by 0.001 in 6 generations"


@pytest.mark.slow
def test_in_one_dimension_and_in_six():
    trials, _ = run(replace(SEARCH, dimensions=1), lambda w: quadratic(w, (0.8,)))
    assert best(trials).weights == pytest.approx((0.8,), abs=0.03)
    at = (1.1, 0.9, 1.2, 0.8, 1.0, 1.1)
    trials, _ = run(replace(SEARCH, dimensions=6, tolerance=1e-4), lambda w: quadratic(w, at))
    assert best(trials).value > quadratic((1.0,) * 6, at) / 5


@pytest.mark.slow
def test_the_start_comes_first_then_populations_of_six():
    _, proposals = run(SEARCH)
    assert proposals[0].candidates == ((1.0, 1.0),)
    assert [(p.generation, len(p.candidates)) for p in proposals[1:4]] == [(1, 6), (2, 6), (3, 6)]
    for weights in (w for p in proposals for w in p.candidates):
        assert all(0.1 <= w <= 2 and w == round(w, 4) for w in weights)
    spread = np.std(
        [p.candidates for p in (propose(replace(SEARCH, seed=s), [Trial((1.0, 1.0), 0.0)]) for s in range(99))]
    )
    assert spread == pytest.approx(0.05, rel=0.1)  # σ


def test_long_steps_count_in_full():
    """The new mean is the weighted mean of the three best, though projection and rounding made other points of them."""
    evolution = searching._evolution(SEARCH)
    evolution.ask()
    candidates = ((2.0, 2.0), (1.0, 1.1), (0.9, 1.0), (1.0, 1.0), (0.1, 2.0), (1.1, 1.0))
    searching._tell(evolution, candidates, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert evolution.mean == pytest.approx(evolution.sp.weights.positive_weights @ np.array(candidates[:3]))


def test_an_optimum_outside_the_box_is_met_at_its_edge():
    trials, _ = run(SEARCH, lambda w: quadratic(w, (3.0, 0.5)))
    assert best(trials).weights[0] == 2.0
    assert max(w for t in trials for w in t.weights) == 2.0


def test_a_search_that_was_interrupted_anywhere_proposes_the_same():
    search = replace(SEARCH, evaluations=40)
    trials, proposals = run(search)
    for cut in (0, 1, 2, 7, 8, 12, 13, 39):
        saved = json.loads(json.dumps([[t.weights, t.value] for t in trials[:cut]]))
        resumed, _ = run(search, trials=[Trial(tuple(weights), value) for weights, value in saved])
        assert resumed == trials
    mixed = random.Random(0).sample(trials, len(trials))
    assert propose(search, mixed) == proposals[-1]
    # Half a generation is known: the rest of it is proposed.
    assert propose(SEARCH, trials[:4]).candidates == proposals[1].candidates[3:]


def test_the_global_generator_is_neither_used_nor_touched():
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    search = replace(SEARCH, evaluations=40)
    first, _ = run(search)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert run(search)[0] == first
    assert run(replace(search, seed=1))[0] != first


def test_only_the_order_of_values_matters():
    search = replace(SEARCH, evaluations=60, tolerance=0.0, patience=99)
    plain, _ = run(search)
    bent, _ = run(search, lambda w: math.exp(50 * quadratic(w)) - 7)
    assert [t.weights for t in plain] == [t.weights for t in bent]


@pytest.mark.parametrize("evaluations", [1, 2, 7, 20])
def test_evaluations_are_a_bound(evaluations):
    trials, proposals = run(replace(SEARCH, evaluations=evaluations))
    assert len(trials) == evaluations
    assert proposals[-1].ended == f"all {evaluations} evaluations are used"
    assert best(trials).value >= quadratic((1.0, 1.0))  # never worse than the start


def test_generations_are_a_bound():
    trials, proposals = run(replace(SEARCH, generations=2))
    assert (len(trials), proposals[-1].ended) == (13, "all 2 generations are done")


def test_without_a_rise_the_search_ends_after_its_patience():
    """Every step away from the start is worse: one trial at the start, then six generations."""
    trials, proposals = run(SEARCH, lambda w: quadratic(w, (1.0, 1.0)))
    assert len(trials) == 1 + 6 * 6
    assert best(trials).weights == (1.0, 1.0)
    assert proposals[-1].ended == "no rise by 0.001 in 6 generations"


def test_a_later_generation_of_equals_ends_the_search():
    trials, proposals = run(replace(SEARCH, tolerance=0.0), lambda w: min(quadratic(w), -0.05))
    assert re.fullmatch(r"all weights of generation \d+ have the same value", proposals[-1].ended)
    assert best(trials).value == -0.05


def test_the_strategy_is_told_ranks_of_equals_in_the_order_in_which_they_were_proposed():
    """By hand: 0.7 is best; of the two 0.5 the first proposed comes first. How the library sorts equals is its own."""
    told = []

    class Recorder:
        def tell(self, points, values, check_points):
            told.extend([[tuple(point) for point in points], values, check_points])

    searching._tell(Recorder(), ((1.0,), (0.9,), (1.1,), (0.8,)), [0.5, 0.7, 0.5, 0.1])
    assert told == [[(1.0,), (0.9,), (1.1,), (0.8,)], [1.0, 0.0, 2.0, 3.0], False]


def test_of_equal_values_the_first_proposed_is_best():
    assert best([Trial((1.0,), 2.0), Trial((1.1,), 2.0)]).weights == (1.0,)


def test_values_that_do_not_rank_are_refused():
    for value in (math.nan, math.inf, -math.inf):
        with refused(
            f"weights 1 / 1 have the value {value} in the search; needed: a finite number: "
            "look at this merge's outputs, or narrow the range"
        ):
            propose(SEARCH, [Trial((1.0, 1.0), value)])
    with refused(
        "all 6 weights of the search's first generation have the value 0.5, so none can be preferred: "
        "choose on more items, by --choose_by gold, or with larger steps"
    ):
        run(SEARCH, lambda _: 0.5)


def test_a_record_of_another_search_is_refused():
    trials, _ = run(replace(SEARCH, evaluations=20))
    with pytest.raises(
        DataError, match="are in the search's record, but this search would not have tried them: resume with"
    ):
        propose(replace(SEARCH, seed=5), trials)
    with refused(
        "weights 1.5 / 0.5 are in the search's record, but this search would not have tried them: "
        "resume with the seed and the settings of the record, or delete it to start anew"
    ):
        propose(SEARCH, [*trials, Trial((1.5, 0.5), 0.0)])
    ended, _ = run(replace(SEARCH, generations=2))
    with pytest.raises(DataError, match="^weights 1.5 / 0.5 are in the search's record, but"):
        propose(replace(SEARCH, generations=2), [*ended, Trial((1.5, 0.5), 0.0)])
    with refused(
        "weights 1 / 1 have two values in the search's record, 0.5 and 0.25; needed: one. "
        "Delete the record to start anew"
    ):
        propose(SEARCH, [Trial((1.0, 1.0), 0.5), Trial((1.0, 1.0), 0.25)])


def test_settings_that_make_no_search_are_refused():
    with refused("a search needs a weight, an evaluation and a population of 2 at least, not 2, 0 and 6"):
        propose(replace(SEARCH, evaluations=0), [])
    with refused(
        "a search from 3 in steps of 0.05 does not start in [0.1, 2]: give a start inside the range and a step above 0"
    ):
        propose(replace(SEARCH, start=3.0), [])
    with refused("the search has tried nothing yet, so it has no best weights; give it --evaluations of 1 or more"):
        best([])


def test_weights_of_layer_groups_are_what_mergekit_reads_from_a_list():
    spread = per_layer((0.1, 0.2, 0.3, 0.4), vectors=2, groups=2, layers=3)
    assert spread == ((0.1, 0.1, 0.2), (0.3, 0.3, 0.4))
    for layers in (3, 24, 32):
        for row in per_layer((0.5, 1.25, 0.75, 1.0, 2.0, 0.1), 2, 3, layers):
            read = [evaluate_setting("w", list(row), i / (layers - 1), validate=float) for i in range(layers)]
            assert read == pytest.approx(row, abs=1e-12)
            assert evaluate_setting("lm_head.weight", list(row), 0, validate=float) == row[0]
    with refused("4 groups of layers in a model of 3 layers; needed: 1 to 3"):
        per_layer((1.0,) * 8, 2, 4, 3)
    with refused("3 weights for 2 vectors of 2 groups of layers; needed: one for each"):
        per_layer((1.0,) * 3, 2, 2, 8)
