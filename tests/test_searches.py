"""Searches for the weights through the script: what is tried, recorded, resumed; lm-eval stood in for where it can
be. test_search.py has the search itself.
"""

import json
import math

import numpy as np
import pytest
import yaml
from long_tasks import LOSS, change_task, results, whole_document
from recipes_and_models import merge_and_score

from common.errors import DataError
from merge_and_evaluate import choosing, scoring, sweep

pytestmark = pytest.mark.usefixtures("long_tasks")
SEARCH = ("--search", "cma", "--choose_on", "colours", "--report_on", "shades")


@pytest.fixture
def tried(monkeypatch) -> list[tuple]:
    """A stand-in for merging and scoring whose score peaks at weights 1.1 and 0.8, the right answers' probability at
    0.9 and 1.2; returns the weights it was asked about."""
    found, weights = [], []

    def model_to_score(making, candidate, name, save_path):
        weights[:] = [candidate.choice.weights]
        return candidate.model(name)

    def stand_in(recipe, model, tasks, identity, filled=None):
        document = whole_document(recipe, model, tasks, identity)
        if tasks.names == ["colours"]:
            found.append(weights[0])
            score = 0.9 - sum((w - p) ** 2 for w, p in zip(weights[0], (1.1, 0.8) * len(weights[0]), strict=False))
            document["results"]["colours"]["acc,none"] = score
            gold = math.exp(-sum((w - p) ** 2 for w, p in zip(weights[0], (0.9, 1.2) * len(weights[0]), strict=False)))
            document["items"] = {"colours": {"doc": ["0", "1"], "value": [score, score], "gold": [gold, gold / 2]}}
        return document

    monkeypatch.setattr(sweep, "model_to_score", model_to_score)
    monkeypatch.setattr(scoring, "evaluate", stand_in)
    return found


@pytest.mark.slow
def test_a_search_climbs_and_records_everything(here, tried, capsys):
    merge_and_score(*SEARCH, "--evaluations", "25")
    said = capsys.readouterr().out
    assert len(tried) == len(set(tried)) == 25 and tried[0] == (1.0, 1.0)
    best = max(tried, key=lambda w: 0.9 - (w[0] - 1.1) ** 2 - (w[1] - 0.8) ** 2)
    summary = results(here)["summary"]
    assert tuple(summary["weights"]) == best and list(summary["tasks"]) == ["shades"]
    assert [tuple(record["weights"]) for record in summary["chosen"]["candidates"]] == tried
    assert summary["chosen"]["ended"] == "all 25 evaluations are used" and "the search ends: all 25" in said
    assert "choosing took 25 merges and 12,000 requests in this job" in said
    config = json.loads((here / "merged" / "merge_report.json").read_text())["recipe"]
    assert all(str(weight) in config for weight in best)


def stopped_after(count: int, tried: list, evaluate):
    """A stand-in for scoring that stops the job once so many were tried."""

    def stops(*args, **given):
        if len(tried) == count:
            raise KeyboardInterrupt
        return evaluate(*args, **given)

    return stops


@pytest.mark.slow
@pytest.mark.parametrize("by", ["score", "gold"])
def test_a_search_stopped_anywhere_takes_the_steps_of_an_undisturbed_one(here, tried, monkeypatch, by):
    """After the start, within and between generations: each weight is scored once, and what is recorded is the same."""
    flags = (*SEARCH, "--evaluations", "15", "--choose_by", by, "--overwrite")
    merge_and_score(*flags)
    whole, summary, evaluate = list(tried), results(here)["summary"], scoring.evaluate
    assert [record["generation"] for record in summary["chosen"]["candidates"]] == [0, *[1] * 6, *[2] * 6, 3, 3]
    for count in (1, 5, 7, 14):
        for path in here.glob("results*.json"):
            path.unlink()
        tried.clear()
        monkeypatch.setattr(scoring, "evaluate", stopped_after(count, tried, evaluate))
        with pytest.raises(KeyboardInterrupt):
            merge_and_score(*flags)
        assert tried == whole[:count]
        monkeypatch.setattr(scoring, "evaluate", evaluate)
        merge_and_score(*flags)
        assert (tried, results(here)["summary"]) == (whole, summary)


@pytest.mark.slow
def test_a_search_that_is_done_is_not_made_again(here, tried):
    """Nor by another seed, whose steps are others; a longer search takes the trials of the shorter one."""
    flags = (*SEARCH, "--evaluations", "10")
    merge_and_score(*flags)
    first = list(tried)
    merge_and_score(*flags)
    assert tried == first
    with pytest.raises(DataError, match="already there; give --overwrite to replace it"):
        merge_and_score(*flags, "--seed", "1")
    merge_and_score(*SEARCH, "--evaluations", "12", "--overwrite")
    assert tried[:10] == first and len(tried) == 12
    tried.clear()
    merge_and_score(*flags, "--seed", "1", "--overwrite")
    assert tried[0] not in tried[1:] and not set(tried) & set(first[1:])


@pytest.mark.slow
def test_a_search_by_gold_resumes_beside_its_own_models(here, tried):
    """What lies under an output's name is known by replaying what chose: the model of a winner that is not yet
    reported is one of this search's own."""
    flags = (*SEARCH, "--evaluations", "10", "--choose_by", "gold")
    merge_and_score(*flags)
    winner = results(here)["summary"]["weights"]
    assert tried.index(tuple(winner)) > 6, "of a generation that a replay by score would not have proposed"
    (here / "results.json").unlink()
    count = len(tried)
    merge_and_score(*flags)
    assert len(tried) == count and results(here)["summary"]["weights"] == winner


def test_a_weight_for_each_group_of_layers(here, tried):
    merge_and_score(*SEARCH, "--evaluations", "2", "--layer_groups", "2")
    assert tried[0] == (1.0,) * 4
    best = results(here)["summary"]["weights"]
    recipe = yaml.safe_load(json.loads((here / "merged" / "merge_report.json").read_text())["recipe"])
    assert [model["parameters"]["weight"] for model in recipe["models"]] == [best[:2], best[2:]]
    with pytest.raises(DataError, match="3 groups of layers in a model of 2 layers; needed: 1 to 2"):
        merge_and_score(*SEARCH, "--evaluations", "2", "--layer_groups", "3", "--overwrite")


def test_a_loss_can_choose_with_a_note(here, capsys, tried):
    change_task(here, "colours", **LOSS)
    merge_and_score(*SEARCH, "--evaluations", "3")
    assert (
        "colours: less is better. How well a model predicts a text says little of how it answers"
        in capsys.readouterr().out
    )


# --- what is compared -----------------------------------------------------------------------------


def test_gold_average_counts_rows_alike():
    """By hand: (log 1/2 + log 1/4)/2 of one row, log 1/8 of the other."""
    document = {
        "summary": {"tasks": {"a": {}, "b": {}}},
        "group_subtasks": {},
        "items": {"a": {"gold": [0.5, 0.25]}, "b": {"gold": [0.125]}},
    }
    assert choosing.gold_average(document, "x") == (pytest.approx(-(1.5 + 3) / 2 * math.log(2)), None)
    document["items"]["b"]["gold"] = [0.0]
    assert choosing.gold_average(document, "x")[0] == pytest.approx((-1.5 * math.log(2) + math.log(1e-12)) / 2)
    document["items"]["b"]["gold"] = [0.5, 0.5, 0.125]  # logs, of base 2: −1 and −2; −1, −1, −3
    errors = math.hypot(0.5 / 2, math.sqrt(8 / 3 / 2 / 3) / 2)
    assert choosing.gold_average(document, "x")[1] == pytest.approx(errors * math.log(2))
    document["items"]["b"]["gold"] = [None]
    with pytest.raises(DataError, match="task 'b' is not multiple choice"):
        choosing.gold_average(document, "x")


# --- through lm-eval ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_through_lm_eval(here):
    merge_and_score(*SEARCH, "--evaluations", "3", "--choose_by", "gold")
    chosen = results(here)["summary"]["chosen"]
    assert len(chosen["candidates"]) == 3 and chosen["by"] == "gold"
    values = [record["value"] for record in chosen["candidates"]]
    assert chosen["weights"] == chosen["candidates"][int(np.argmax(values))]["weights"]
