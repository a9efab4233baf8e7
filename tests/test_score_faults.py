"""Faults that a review found in scoring, racing and comparing: each test failed on the code as it was."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
from long_tasks import EVAL as LONG
from long_tasks import change_task, race, whole_document
from recipes_and_models import EVAL, left_over, merge_and_score, score, write_yaml

from common.errors import DataError
from merge_and_evaluate import choosing, eval_machine, evaluation, racing, scoring
from merge_and_evaluate.eval_recipes import read_eval_recipe
from merge_and_evaluate.eval_tasks import Tasks, find_tasks
from merge_and_evaluate.evaluation import eval_identity
from merge_and_evaluate.race import next_step, outcome
from merge_and_evaluate.race_plan import plan, strata_of
from merge_and_evaluate.race_tasks import read_tasks, strata_of_tasks
from merge_and_evaluate.scoring import Scoring

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


# --- what a score's identity holds ----------------------------------------------------------------


def identity() -> str:
    recipe = read_eval_recipe("eval.yml")
    return eval_identity(recipe, find_tasks(recipe, ["colours"]), "model")


def test_scores_of_a_cpu_and_of_a_gpu_are_not_the_same(here, monkeypatch):
    """The recipe names no device: this machine's decides, and with it the dtype."""
    write_yaml(here / "eval.yml", {"include_path": "./tasks", "tasks": ["colours"]})
    on_cpu = identity()
    for known in (eval_machine, evaluation):
        monkeypatch.setattr(known, "device_of", lambda recipe: "cuda:1", raising=False)
    assert identity() != on_cpu


def test_an_identity_is_the_same_in_every_run(here):
    """A group's settings hold functions, whose text has their address in memory."""
    write_yaml(here / "eval.yml", {"include_path": "./tasks", "tasks": ["colours"]})

    found = set()
    for _ in range(2):
        namespace = {}
        exec("def process(docs):\n    return docs", namespace)
        found.add(namespace["process"])
    identities = set()
    for function in found:
        with pytest.MonkeyPatch.context() as settings:
            settings.setattr(Tasks, "part", property(lambda self, f=function: [{"process_docs": f}]))
            identities.add(identity())
    assert len(found) == 2 and len(identities) == 1


# --- another model's results ----------------------------------------------------------------------


def test_scores_from_beside_do_not_replace_another_models(here, monkeypatch):
    """wild was scored into b.json: so it is not scored again, but results.json is base's."""
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    score("base", "--output_path", "out/results.json")
    score("wild", "--output_path", "out/b.json")
    before = (here / "out" / "results.json").read_text()
    with pytest.raises(DataError, match="out/results.json: already there; give --overwrite"):
        score("wild", "--output_path", "out/results.json")
    assert (here / "out" / "results.json").read_text() == before
    score("wild", "--output_path", "out/b.json", "--name", "again")
    assert json.loads((here / "out" / "b.json").read_text())["summary"]["name"] == "again"


# --- groups ---------------------------------------------------------------------------------------


def group_of(here, name: str, tasks: list, **settings) -> None:
    write_yaml(here / "tasks" / f"{name}.yaml", {"group": name, "task": tasks, **settings})


def test_a_task_in_a_group_written_in_place_is_held_out(here, capsys):
    group_of(here, "outer", [{"group": "stem", "task": ["colours", "shades"]}, "tints"])
    write_yaml(here / "eval.yml", {**EVAL, "tasks": ["outer"]})
    flags = ("--weights", "0.5", "1", "--dry_run")
    merge_and_score(*flags, "--choose_on", "colours")
    said = capsys.readouterr().out.splitlines()
    assert "choose  on colours 0-shot" in said and "report  on shades 0-shot, tints 0-shot" in said
    merge_and_score(*flags, "--choose_on", "tints")
    assert "report  on colours 0-shot, shades 0-shot" in capsys.readouterr().out.splitlines()
    with pytest.raises(DataError, match="task 'shades' would choose the weight and report it"):
        merge_and_score(*flags, "--choose_on", "outer", "--report_on", "shades")


@pytest.mark.parametrize("by_size", [True, False])
def test_a_race_weighs_a_group_as_the_score_does(here, long_tasks, by_size):
    """120 and 80 items: 0.6 and 0.4 of the group, or half each where it says weight_by_size: false."""
    group_of(here, "both", ["colours", "tints"], aggregate_metric_list=[{"metric": "acc", "weight_by_size": by_size}])
    write_yaml(here / "eval.yml", {**LONG, "tasks": ["both"]})
    recipe = read_eval_recipe("eval.yml")
    loaded = read_tasks(Scoring(recipe, find_tasks(recipe, ["both"])))
    weights = {stratum.name: stratum.weight for stratum in strata_of_tasks(recipe, loaded)}
    assert weights == pytest.approx({"colours": 0.6, "tints": 0.4} if by_size else {"colours": 0.5, "tints": 0.5})


@pytest.mark.parametrize(
    "group, score, mean",
    [("g", 1 / 4, (3 * math.log(0.5) + math.log(0.1)) / 4), ("g", 1 / 2, None), ("mmlu", 1 / 4, None)],
)
def test_gold_is_averaged_as_the_score_is(group, score, mean):
    """Three items of 1/2, all wrong, and one of 1/10, which is right: by items, or task by task."""
    document = {
        "summary": {"tasks": {group: {"value": score}}},
        "group_subtasks": {group: ["a", "b"]},
        "items": {"a": {"gold": [0.5] * 3, "value": [0] * 3}, "b": {"gold": [0.1], "value": [1]}},
    }
    expected = (math.log(0.5) + math.log(0.1)) / 2 if mean is None else mean
    assert choosing.gold_average(document, "x")[0] == pytest.approx(expected)


def test_the_gold_of_a_races_table_is_what_it_raced_on(here, asked):
    group_of(here, "both", ["colours", "tints"], aggregate_metric_list=[{"metric": "acc"}])
    write_yaml(here / "eval.yml", {**LONG, "tasks": ["both", "shades"]})
    race("0", "--weights", "0.3", "0.9", "--choose_on", "both", "--choose_by", "gold")
    items = kept(here)["0.9"]["items"]
    means = {task: np.mean(np.log(items[task]["gold"])) for task in items}
    with open("results_sweep.csv") as file:
        (line,) = [line for line in csv.DictReader(file) if line["chosen"] == "1"]
    assert float(line["gold"]) == pytest.approx(0.6 * means["colours"] + 0.4 * means["tints"])


# --- a race's table -------------------------------------------------------------------------------


def test_a_races_table_says_the_limit_and_the_shots_and_no_best(here, asked, capsys):
    write_yaml(here / "eval.yml", {**LONG, "limit": 150, "num_fewshot": 3})
    for task in ("colours", "tints"):
        change_task(here, task, num_fewshot=1, fewshot_split="test")
    race("0.5", "--weights", "0.1", "0.8", "0.9", "--choose_on", "colours", "tints")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][-4:]
    assert "colours 3-shot" in table[0] and "tints 3-shot" in table[0]
    assert all(re.match(r"\| 0\.\d \(\d+ items\) \(limit 150\) \|", line) for line in table[1:])
    assert "**" not in "".join(table)
    with open("results_sweep.csv") as file:
        assert [line["limit"] for line in csv.DictReader(file)] == ["150"] * 3


def test_who_is_worse_than_whom_is_said():
    """b drops out behind a, which c beats in the end."""
    strata = strata_of({"t": {"t": 4000}})
    drawn = plan(strata, ("a", "b", "c"), 0.001, seed=0)
    values = np.random.default_rng(0).random(4000) < np.array([[0.7], [0.3], [0.7]])
    order = drawn.order[0]
    early = order[: drawn.counts[0][0]]
    values[2, order], values[2, early] = True, values[0, early]
    scored = {name: {"t": row.astype(float)} for name, row in zip("abc", values, strict=True)}
    said = outcome(drawn, next_step(drawn, scored), "points")
    assert said.startswith("c wins") and "(95 %, over all pairs): b (than a), a" in said
