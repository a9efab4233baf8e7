"""Faults that a review found in races: each test failed on the code as it was."""

import csv
import json
import math
import re
import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from conftest import first_quick
from long_tasks import EVAL as LONG
from long_tasks import LOSS, change_task, group_of, race, results
from recipes_and_models import left_over, write_yaml

import merge_and_evaluate_7b
from common.errors import DataError
from merge_and_evaluate import racing
from merge_and_evaluate.candidates import model_to_score
from merge_and_evaluate.eval_recipes import read_eval_recipe
from merge_and_evaluate.eval_tasks import find_tasks
from merge_and_evaluate.merging import plan_merge
from merge_and_evaluate.race import next_step, outcome
from merge_and_evaluate.race_plan import plan, strata_of
from merge_and_evaluate.race_tasks import read_tasks, strata_of_tasks
from merge_and_evaluate.scoring import Scoring

RACE = ("0.5", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints")


# --- where results go -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results_race.json", "results_sweep.csv", "results_sweep.png", "results.log"])
def test_a_directory_is_no_table_and_no_log(here, asked, name):
    (here / name).mkdir()
    with pytest.raises(DataError, match=f"{name}: a directory; move it away, or write elsewhere"):
        race(*RACE, "--overwrite")
    assert asked == [] and left_over(here) == {name} - {"results.log"}


@pytest.mark.parametrize(
    "save_path, output_path",
    first_quick(
        ("merged", "merged/results.json"),
        ("./x/../merged/", "{here}/merged/deep/results.json"),
        ("link", "merged/results.json"),
        ("merged", "link/results.json"),
    ),
)
def test_results_do_not_go_into_the_directory_that_the_winner_replaces(here, asked, save_path, output_path):
    (here / "merged").mkdir()
    (here / "link").symlink_to("merged")
    paths = ("--save_path", save_path, "--output_path", output_path.format(here=here))
    with pytest.raises(DataError, match=r"results.json: inside .*, which the chosen model replaces; write the res"):
        race(*RACE, *paths, "--overwrite")
    assert asked == [] and list((here / "merged").iterdir()) == []


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


# --- what is kept ---------------------------------------------------------------------------------


def kept(here) -> dict:
    """What the race's file has of each candidate."""
    return json.loads((here / "results_race.json").read_text())["candidates"]


def drop_winner(here) -> None:
    """Delete what a race wrote beside what it scored."""
    (here / "results.json").unlink()
    shutil.rmtree(here / "merged")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_another_seed_scores_anew(here, asked):
    """Which items share a batch decides what precedes them in their prompts."""
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


@pytest.mark.slow
def test_a_finished_sweep_is_not_taken_for_one_of_other_data(here, asked):
    """The choosing task is as it was, the reported one has changed."""
    path = here / "shades.jsonl"  # what is in the recipe's folder counts for every task
    (here / "tasks" / "shades.jsonl").rename(path)
    change_task(here, "shades", dataset_kwargs={"data_files": {"test": str(path)}})
    race(*RACE)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="results.json: already there"):
        race(*RACE)


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_size", [True, False])
def test_a_race_weighs_a_group_as_the_score_does(here, long_tasks, by_size):
    """120 and 80 items: 0.6 and 0.4 of the group, or half each where it says weight_by_size: false."""
    group_of(here, "both", ["colours", "tints"], aggregate_metric_list=[{"metric": "acc", "weight_by_size": by_size}])
    write_yaml(here / "eval.yml", {**LONG, "tasks": ["both"]})
    recipe = read_eval_recipe("eval.yml")
    loaded = read_tasks(Scoring(recipe, find_tasks(recipe, ["both"])))
    weights = {stratum.name: stratum.weight for stratum in strata_of_tasks(recipe, loaded)}
    assert weights == pytest.approx({"colours": 0.6, "tints": 0.4} if by_size else {"colours": 0.5, "tints": 0.5})


def test_the_gold_of_a_races_table_is_what_it_raced_on(here, asked):
    group_of(here, "both", ["colours", "tints"], aggregate_metric_list=[{"metric": "acc"}])
    write_yaml(here / "eval.yml", {**LONG, "tasks": ["both", "shades"]})
    race("0", "--weights", "0.3", "0.9", "--choose_on", "both", "--choose_by", "gold")
    items = kept(here)["0.9"]["items"]
    means = {task: np.mean(np.log(items[task]["gold"])) for task in items}
    with open("results_sweep.csv") as file:
        (line,) = [line for line in csv.DictReader(file) if line["chosen"] == "1"]
    assert float(line["gold"]) == pytest.approx(0.6 * means["colours"] + 0.4 * means["tints"])


@pytest.mark.slow
def test_gold_can_choose_on_tasks_that_point_both_ways(here, asked):
    """There is a mean log-probability, and no average score: none is drawn."""
    change_task(here, "colours", **LOSS)
    race("0.5", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints", "--choose_by", "gold")
    assert results(here)["summary"]["weights"] == [0.9]
    with open("results_sweep.csv") as file:
        assert {line["average"] for line in csv.DictReader(file)} == {""}


# --- what is said ---------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_weights_with_the_same_answers_race_to_the_end(here, asked, monkeypatch, capsys):
    """No difference on any item is no scale for a standard error of new ones: none is told, and the file is JSON."""
    stand_in = racing.score_items

    def one_answer(*args):
        found = stand_in(*args)
        return {task: {**record, "value": [1] * len(record["value"])} for task, record in found.items()}

    monkeypatch.setattr(racing, "score_items", one_answer)
    race(*RACE)
    said = capsys.readouterr().out
    assert "0.9 drops out after 1,000 of 1,000 items: the same on all items as 0.3\n" in said
    assert "though new items might say otherwise, in points: 0.9, the same on all items\n" in said and "inf" not in said
    text = (here / "results.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    (dropped,) = [tried["dropped"] for tried in results(here)["summary"]["chosen"]["candidates"] if "dropped" in tried]
    assert dropped["difference"] == 0 and dropped["stderr"] is None


@pytest.mark.slow
def test_a_race_counts_what_it_drew_and_not_what_an_earlier_one_scored(here, asked, capsys):
    """A margin of 0 scores more than one of 8, which then finds all its items there, and says what it says alone."""
    said, chosen = [], []
    for margin, output in (("8", "alone"), ("0", "results"), ("8", "results")):
        race(margin, *RACE[1:], "--output_path", f"{output}.json", "--overwrite")
        said.append(re.search(r"the race took ([\d,]+ of [\d,]+ items)", capsys.readouterr().out)[1])
        chosen.append(json.loads((here / f"{output}.json").read_text())["summary"]["chosen"])
        with open(f"{output}_sweep.csv") as file:
            chosen[-1]["table"] = file.read()
    assert said[0] == said[2] != said[1]
    assert chosen[0] == chosen[2] and chosen[0]["items"] < chosen[1]["items"]


# --- models that are written ----------------------------------------------------------------------

WRITTEN = ("--engine", "mergekit", "--weights", "0.3", "0.6", "0.9", "--choose_on", "colours", "tints")


@pytest.mark.slow
def test_a_race_of_written_models_says_the_disk_they_take(here, asked, monkeypatch, capsys):
    """All of them are there until they drop out, and each is merged once."""
    monkeypatch.setattr(merge_and_evaluate_7b, "plan_merge", lambda *args: replace(plan_merge(*args), nbytes=10**9))
    for flags, disk, merges in [(WRITTEN, 3, 3), (WRITTEN[2:], 1, 15)]:  # in memory, only the winner is written
        race("0.5", *flags, "--dry_run")
        said = capsys.readouterr().out
        assert f"\ndisk       {disk}.000 GB  needed" in said and f"\ncost    at most {merges} merges and " in said


def test_a_race_that_does_not_fit_on_the_disk_is_refused_before_it_starts(here, asked, monkeypatch):
    usage = namedtuple("usage", "total used free")
    whole = sum(path.stat().st_size for path in (here / "base").glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2.5 * whole))
    with pytest.raises(DataError, match="GB are needed there and .* GB are free; free some space or write elsewhere"):
        race("0.5", *WRITTEN)
    assert asked == [] and left_over(here) == set()


@pytest.mark.slow
def test_a_written_model_is_merged_once_in_a_race(here, asked, monkeypatch, capsys):
    stand_in = racing.model_to_score

    def merges_too(*args):
        stand_in(*args)
        return model_to_score(*args)

    monkeypatch.setattr(racing, "model_to_score", merges_too)
    race("0", *WRITTEN)
    said = capsys.readouterr().out
    assert re.search(r"items \(\d+%\): 3 merges and [\d,]+ requests in this job", said) and said.count("round ") > 3
    assert left_over(here) == {"merged", "results.json", "results_race.json", "results_sweep.csv", "results_sweep.png"}
