"""Faults that a review found in scoring, racing and comparing: each test failed on the code as it was."""

import json
import math

import pytest
from long_tasks import race
from recipes_and_models import left_over

from common.errors import DataError
from merge_and_evaluate import choosing, racing

RACE = ("0.5", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints")


# --- NaN ------------------------------------------------------------------------------------------


def nan_from(score_items, batch: int, key: str):
    """score_items whose batch of that number has a NaN; a race that asks for more than it should is stopped."""
    asked = []

    def scores(*args):
        asked.append(args)
        assert len(asked) < 40, "the race asks for the same items every turn"
        found = score_items(*args)
        if len(asked) == batch:
            next(iter(found.values()))[key][0] = math.nan
        return found

    return scores


@pytest.mark.parametrize("by, key", [("gold", "gold"), ("score", "value")])
def test_a_race_ends_at_a_nan_and_does_not_keep_it(here, asked, monkeypatch, by, key):
    monkeypatch.setattr(racing, "score_items", nan_from(racing.score_items, 2, key))
    line = "results_race.json: task 'colours': the model of weight 0.9 gives NaN; lower its weight, or score with "
    with pytest.raises(DataError, match=line + "--dtype bfloat16"):
        race(*RACE, "--choose_by", by)
    assert list(json.loads((here / "results_race.json").read_text())["candidates"]) == ["0.3"]
    assert left_over(here) == {"results_race.json"}


def test_a_model_of_nan_is_said_where_gold_chooses(tmp_path):
    document = {"summary": {"tasks": {"a": {}}}, "items": {"a": {"gold": [0.5, math.nan], "value": [1, 0]}}}
    with pytest.raises(DataError, match="r.json: task 'a': the model gives NaN; lower its weight"):
        choosing.gold_average(document, "r.json")
