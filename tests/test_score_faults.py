"""Faults that a review found in scoring, racing and comparing: each test failed on the code as it was."""

import json
import math
import shutil

import pytest
from long_tasks import change_task, race
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


# --- what a race keeps ----------------------------------------------------------------------------


def kept(here) -> dict:
    """What the race's file has of each candidate."""
    return json.loads((here / "results_race.json").read_text())["candidates"]


def drop_winner(here) -> None:
    """Delete what a race wrote beside what it scored."""
    (here / "results.json").unlink()
    shutil.rmtree(here / "merged")


def test_a_large_race_is_read_again(here, asked, monkeypatch):
    """800,000 items, as of 28 candidates on the whole leaderboard: more than a checkpoint's JSON files may have."""
    race(*RACE)
    whole = json.loads((here / "results_race.json").read_text())
    size = (here / "results_race.json").stat().st_size
    items = sum(len(task["number"]) for entry in whole["candidates"].values() for task in entry["items"].values())
    assert size < 40 * items + 2000, "bytes an item"
    other = {"number": list(range(800_000)), "value": [0.123456789] * 800_000, "gold": [0.123456789] * 800_000}
    whole["candidates"]["other"] = {"identity": "x", "items": {"other": other}}
    (here / "results_race.json").write_text(json.dumps(whole))
    (here / "results.json").unlink()
    asked.clear()
    race(*RACE, "--overwrite")
    assert asked == []


def test_items_of_changed_documents_are_not_taken(here, asked, monkeypatch):
    monkeypatch.setattr(racing, "eval_identity", lambda *_: "")  # as of a data set on the Hub: no hash of the data
    race(*RACE)
    before = len(asked)
    path = here / "tasks" / "tints.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    drop_winner(here)
    with pytest.raises(DataError, match="weight 0.3 was scored there with other documents in tints; give --overwrite"):
        race(*RACE)
    assert len(asked) == before
    race(*RACE, "--overwrite")
    assert len(asked) == 2 * before


def test_another_seed_scores_anew(here, asked):
    """Which items share a batch decides what precedes them in their prompts. (A guard: so it was before.)"""
    race(*RACE)
    before = len(asked)
    drop_winner(here)
    with pytest.raises(DataError, match=r"weight 0.3 was scored there with other models, tasks or settings; give"):
        race(*RACE, "--seed", "1")
    race(*RACE, "--seed", "1", "--overwrite")
    again = [(task, number) for label, task, number in asked[before:] if label == "0.9"]
    items = kept(here)["0.9"]["items"]
    assert sorted(again) == sorted((task, number) for task, of_task in items.items() for number in of_task["number"])


@pytest.mark.slow
def test_all_candidates_of_a_round_are_asked_with_the_same_demonstrations(here, long_tasks, monkeypatch):
    """Prompts of the same items in two candidates, through lm-eval, with demonstrations that are drawn."""
    from lm_eval.api.task import ConfigurableTask

    for task in ("colours", "tints"):
        change_task(here, task, num_fewshot=2, fewshot_split="test")
    prompts, began = [], []
    context = ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        "lm_eval.api.task.ConfigurableTask.fewshot_context",
        lambda *args, **named: prompts.append(context(*args, **named)) or prompts[-1],
    )
    score_items = racing.score_items
    monkeypatch.setattr(racing, "score_items", lambda *args: began.append(len(prompts)) or score_items(*args))
    race("0", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints")
    batches = [prompts[start:end] for start, end in zip(began, [*began[1:], None], strict=True)]
    size = len(batches[0])
    assert size > 10 and batches[0] == batches[1][:size] and batches[0][0].count("\n\n") == 2
