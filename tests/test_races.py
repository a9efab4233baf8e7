"""Races and searches over real merges: what is scored, recorded, resumed, refused; lm-eval stood in for where it can
be.
"""

import csv
import json
import math
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from recipes_and_models import RECIPE, left_over, merge_and_score, write_yaml

import merge_and_evaluate_7b
from common.errors import DataError
from merge_and_evaluate import choosing, in_memory, racing, scoring, sweep
from merge_and_evaluate.race_plan import ROUNDS

TASKS = {"colours": 120, "shades": 60, "tints": 80}  # items of each
EVAL = {"model": "hf", "include_path": "./tasks", "tasks": list(TASKS), "batch_size": 16, "device": "cpu"}


def save_long_tasks(folder, times: int = 1) -> None:
    """The three tasks with many different items, answers drawn at random: candidates of random weights score by
    chance."""
    things = ["sky", "grass", "snow", "coal", "blood", "lemon"]
    colours = ["blue", "green", "white", "black", "red", "yellow"]
    for task, count in TASKS.items():
        draw, lines = np.random.default_rng(list(TASKS).index(task)), []
        for _ in range(times * count):
            text = "the " + " ".join(draw.choice(things, 5))
            lines.append(
                {"thing": text, "choices": draw.permutation(colours)[:4].tolist(), "gold": int(draw.integers(4))}
            )
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = json.loads((folder / f"{task}.yaml").read_text())
        config["dataset_kwargs"]["data_files"]["test"] = str(data)
        (folder / f"{task}.yaml").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def long_tasks(here):
    save_long_tasks(here / "tasks")
    write_yaml(here / "eval.yml", EVAL)


@pytest.fixture
def asked(here, long_tasks, monkeypatch) -> list[tuple[str, str, int]]:
    """1,000 items to choose on, for all five rounds. lm-eval stood in for: an item is right if its number, spread
    evenly over 0..1, is below a score that peaks at weight 0.9. Returns every (candidate, task, item) that was asked
    for. No model is loaded or merged to be scored."""
    save_long_tasks(here / "tasks", times=5)
    found, weight, label = [], [], []

    def model_to_score(making, candidate, name, save_path):
        weight[:] = [model["parameters"]["weight"] for model in candidate.merge.recipe.config["models"]]
        label[:] = [candidate.label]
        return candidate.model(name)

    def score_items(lm, recipe, loaded, metrics, samples):
        records = {}
        for task, numbers in samples.items():
            found.extend((label[0], task, number) for number in numbers)
            score = 0.9 - 0.2 * abs(np.mean(weight) - 0.9)
            spread = [(number * 0.618034) % 1 for number in numbers]
            records[task] = {
                "doc": [f"{number:016x}" for number in numbers],
                "value": [int(x < score) for x in spread],
                "gold": [min(0.99, max(0.01, score + 0.1 * math.sin(number))) for number in numbers],
            }
        return records

    class Nothing:
        def __enter__(self):
            return None

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(racing, "model_to_score", model_to_score)
    monkeypatch.setattr(racing, "score_items", score_items)
    monkeypatch.setattr(racing, "opened", lambda *_: Nothing())
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    return found


def whole_document(recipe, model, tasks, identity, filled=None) -> dict:
    """What stands in for lm-eval where the winner is reported."""
    scores = {name: {"acc,none": 0.5, "acc_stderr,none": 0.01} for name in tasks.names}
    empty = ("group_subtasks", "n-shot", "n-samples", "higher_is_better", "versions", "configs")
    return {"results": scores, **{key: {} for key in empty}}


def race(*flags: str) -> None:
    merge_and_score("--race", *flags)


RACE = ("0.5", "--weights", "0.1", "0.3", "0.6", "0.9", "1.2", "--choose_on", "colours", "tints")


def results(here) -> dict:
    return json.loads((here / "results.json").read_text())


# --- what a race does -----------------------------------------------------------------------------


def test_a_race_scores_nothing_twice_and_finds_the_peak(here, asked, capsys):
    race(*RACE)
    said = capsys.readouterr().out
    assert len(set(asked)) == len(asked) < 5 * 1000
    assert {task for _, task, _ in asked} == {"colours", "tints"}
    by_weight = {weight: sum(w == weight for w, _, _ in asked) for weight in ("0.1", "0.9")}
    assert by_weight["0.1"] < by_weight["0.9"], "the worst drops out before the winner is certain"
    summary = results(here)["summary"]
    assert summary["weights"] == [0.9] and list(summary["tasks"]) == ["shades"]
    chosen = summary["chosen"]
    assert (
        chosen["race"] == {"points": 0.5, "seed": 0}
        and chosen["items"] == len(asked)
        and chosen["items_of_all"] == 5000
    )
    assert {"after_round", "difference", "stderr", "worse"} <= chosen["candidates"][0]["dropped"].keys()
    assert "dropped" not in chosen["candidates"][3]
    assert f"the race took {len(asked):,} of 5,000 items" in said and "0.1 drops out after" in said
    assert "at most 25 merges and 20,000 requests (4,000 for each of 5) to choose" in said
    assert left_over(here) == {"merged", "results.json", "results_race.json", "results_sweep.csv", "results_sweep.png"}


@pytest.mark.slow
def test_all_candidates_of_a_round_answer_the_same_items(here, asked):
    race(*RACE)
    first = {weight: {(t, i) for w, t, i in asked if w == weight} for weight in ("0.1", "0.3", "0.6", "0.9", "1.2")}
    smallest = min(first.values(), key=len)
    assert all(smallest <= items for items in first.values())
    assert len(smallest) <= 1000 * ROUNDS[-1]


@pytest.mark.slow
def test_another_seed_draws_other_items(here, asked):
    race(*RACE)
    before = set(asked)
    asked.clear()
    race(*RACE, "--seed", "1", "--output_path", "other.json", "--overwrite")
    assert set(asked) != before


def test_a_race_by_gold_reads_the_probabilities_and_shows_them(here, asked, capsys):
    race(*RACE, "--choose_by", "gold")
    said = capsys.readouterr().out
    assert results(here)["summary"]["weights"] == [0.9] and results(here)["summary"]["chosen"]["by"] == "gold"
    assert "hundredths of a nat behind 0.9" in said and "points" not in said
    kept = json.loads((here / "results_race.json").read_text())["candidates"]["0.9"]["items"]
    means = [np.mean(np.log(kept[task]["gold"])) for task in ("colours", "tints")]
    with open("results_sweep.csv") as file:
        (line,) = [line for line in csv.DictReader(file) if line["chosen"] == "1"]
    assert float(line["gold"]) == pytest.approx(np.mean(means)) and 0 < float(line["gold_stderr"]) < 0.1
    assert f"| **{np.mean(means):.4f} ± " in said and "log p of the right answer, nats (chooses) |" in said


def test_values_are_turned_round_where_less_is_better(here, asked, monkeypatch):
    """The worst accuracy wins if the task says that less is better."""
    for task in TASKS:
        path = here / "tasks" / f"{task}.yaml"
        config = json.loads(path.read_text())
        config["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
        path.write_text(json.dumps(config))
    race(*RACE)
    assert results(here)["summary"]["weights"] == [0.1]


def test_a_race_without_choose_on_scores_the_winner_in_full(here, asked, capsys):
    race("0.5", "--weights", "0.3", "0.9")
    summary = results(here)["summary"]
    assert list(summary["tasks"]) == list(TASKS) and summary["chosen"]["held_out"] is False
    assert "which flatters it" in capsys.readouterr().out


# --- recipes --------------------------------------------------------------------------------------


def save_recipes(here, **weights: float) -> list[str]:
    """A recipe for each name, with that weight for both models; ties sweeps its lambda. -> what --recipe takes."""
    for name, weight in weights.items():
        models = [{**model, "parameters": {"weight": weight}} for model in RECIPE["models"]]
        write_yaml(here / f"{name}.yml", {**RECIPE, "models": models})
    return ["--recipe", *(f"{name}.yml" for name in weights)]


def race_recipes(*flags: str) -> None:
    merge_and_evaluate_7b.main(["--eval_recipe", "eval.yml", "--save_path", "merged", "--race", *flags])


ON = ("--choose_on", "colours", "tints")
RECIPES = {"far.yml", "near.yml", "off.yml"}


def test_recipes_race_with_the_weights_they_have(here, asked, capsys):
    flags = save_recipes(here, far=0.1, near=0.9, off=0.5)
    race_recipes("0.5", *flags, *ON)
    said = capsys.readouterr().out
    assert {name for name, _, _ in asked} == {"far", "near", "off"} and len(set(asked)) == len(asked)
    summary = results(here)["summary"]
    assert summary["name"] == summary["recipe"] == "near" and "weights" not in summary
    assert [record["recipe"] for record in summary["chosen"]["candidates"]] == ["far", "near", "off"]
    assert "far drops out after" in said and "near wins after" in said and "chosen: recipe near, by the average" in said
    assert "round 1 of 5, recipe far: " in said
    config = json.loads((here / "merged" / "merge_report.json").read_text())
    assert config["recipe"] == (here / "near.yml").read_text()
    race_files = {"results_race.json", "results_sweep.csv", "results_sweep.png"}
    assert left_over(here) - RECIPES == {"merged", "results.json"} | race_files
    with open("results_sweep.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["recipe"], line["chosen"]) for line in lines] == [("far", "0"), ("near", "1"), ("off", "0")]
    taken = [int(line["items"]) for line in lines]
    assert f"| far ({taken[0]} items) |" in said and "so these scores do not compare" in said
    assert "samples differ" not in said
    assert sum(taken) == summary["chosen"]["items"] == len(asked)


@pytest.mark.slow
def test_recipes_race_with_each_of_the_weights(here, asked, capsys):
    """Every recipe's weight is chosen the same way, in one race; ties' is its lambda."""
    flags = save_recipes(here, plain=1.0)
    write_yaml(
        here / "elect.yml", {**RECIPE, "merge_method": "ties", "parameters": {"lambda": 1.0, "normalize": False}}
    )
    race_recipes("0.5", *flags, "elect.yml", "--weights", "0.3", "0.9", *ON, "--name", "best")
    assert {name for name, _, _ in asked} == {"plain 0.3", "plain 0.9", "elect 0.3", "elect 0.9"}
    chosen = results(here)["summary"]["chosen"]
    assert (chosen["recipe"], chosen["weights"]) == ("plain", [0.9]) and results(here)["summary"]["name"] == "best"
    assert "best: recipe plain with weight 0.9 chosen on colours, tints" in compared(capsys, "results.json")
    with open("results_sweep.csv") as file:
        assert next(csv.reader(file))[:2] == ["recipe", "weight"]


def compared(capsys, *files: str) -> str:
    capsys.readouterr()
    merge_and_evaluate_7b.main(["--compare", *files])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_stopped_race_of_recipes_resumes(here, asked, monkeypatch, stop_after):
    flags = save_recipes(here, far=0.1, near=0.9, off=0.8)
    race_recipes("0.1", *flags, *ON, "--output_path", "whole.json")
    whole = list(asked)
    asked.clear()
    stand_in, batches = racing.score_items, []

    def stops(*args):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(1)
        return stand_in(*args)

    monkeypatch.setattr(racing, "score_items", stops)
    with pytest.raises(KeyboardInterrupt):
        race_recipes("0.1", *flags, *ON, "--overwrite")
    assert 0 < len(asked) < len(whole)
    monkeypatch.setattr(racing, "score_items", stand_in)
    race_recipes("0.1", *flags, *ON, "--overwrite")
    assert sorted(asked) == sorted(whole)


@pytest.mark.slow
def test_a_changed_recipe_is_scored_anew_only_if_told(here, asked):
    race_recipes("0.5", *save_recipes(here, far=0.1, near=0.9), *ON)
    (here / "results.json").unlink()
    asked.clear()
    flags = save_recipes(here, far=0.2, near=0.9)
    line = "results_race.json: recipe far was scored there with other models, tasks or settings"
    with pytest.raises(DataError, match=line):
        race_recipes("0.5", *flags, *ON)
    race_recipes("0.5", *flags, *ON, "--overwrite")
    assert {name for name, _, _ in asked} == {"far"}, "what the other scored still counts"


def test_recipes_without_a_race_are_all_scored(here, tried_recipes, capsys):
    """A plain sweep over recipes, each with a results file of its own."""
    merge_and_evaluate_7b.main(
        [*save_recipes(here, far=0.1, near=0.9), "--eval_recipe", "eval.yml", "--save_path", "merged"]
    )
    assert tried_recipes == ["far", "near"]
    assert results(here)["summary"]["chosen"]["recipe"] == "near"
    assert {"results_recipe_far.json", "results_recipe_near.json"} <= left_over(here)
    said = capsys.readouterr().out
    assert "recipe near (2 of 2): average 90.00" in said and "chosen: recipe near, by the average" in said


@pytest.mark.parametrize(
    "names, flags, line",
    [
        (["a.yml"], [], "a race needs two candidates or more and got 1"),
        (["a.yml", "a.yml"], [], "--recipe names a.yml twice; name each recipe once"),
        (["a.yml", "x/a.yml"], [], "--recipe: a.yml and x/a.yml would both be called 'a' in tables; rename one"),
        (
            ["a.yml", "gradient.yml"],
            ["--weights", "1"],
            "gradient.yml: ./wild: weight is [0.1, 0.9]; a sweep needs one",
        ),
        (
            ["a.yml", "b.yml"],
            ["--choose_on", "colours", "--report_on", "colours"],
            "would choose the weight and report",
        ),
        (["a.yml", "b.yml", "none.yml"], [], "none.yml: no such recipe"),
        (["a.yml", "b.yml"], ["--models", "./wild"], "a.yml: --models names 1 and the recipe has 2"),
    ],
)
def test_races_of_recipes_that_are_refused(here, names, flags, line):
    save_recipes(here, a=0.1, b=0.9)
    write_yaml(here / "gradient.yml", {**RECIPE, "models": [{"model": "./wild", "parameters": {"weight": [0.1, 0.9]}}]})
    (here / "x").mkdir()
    (here / "x" / "a.yml").write_text((here / "a.yml").read_text())
    before = left_over(here)
    if len(names) == 1:
        flags = ["--weights", "1"]
    for dry in ([], ["--dry_run"]):
        with pytest.raises(DataError, match=re.escape(line)):
            race_recipes("0.5", "--recipe", *names, *flags, *dry)
        assert left_over(here) == before


def test_dry_run_of_a_race_of_recipes(here, capsys):
    flags = save_recipes(here, a=0.1, b=0.9)
    before = left_over(here)
    race_recipes("0.5", *flags, "--weights", "0.3", "0.9", "1.2", *ON, "--dry_run")
    said = capsys.readouterr().out
    for line in (
        "merge   a.yml: task_arithmetic, 3 weights",
        "merge   b.yml: task_arithmetic, 3 weights",
        "cost    at most 12 merges and 4,800 requests (800 for each of 6) to choose",
        "GB  more, for the model that candidates are merged into; none is written",
    ):
        assert line in said
    assert said.count("reads ") == 3 and left_over(here) == before


@pytest.mark.slow
def test_recipes_race_in_one_loaded_model(here, monkeypatch, capsys):
    """Through lm-eval: recipes of one base share the model in memory, another base has its own after it, and what each
    scored is what its written merge scores."""
    loads = []
    load = in_memory._load
    monkeypatch.setattr(in_memory, "_load", lambda *args: loads.append(args[1]) or load(*args))
    flags = save_recipes(here, a=0.2, b=0.9)
    write_yaml(here / "c.yml", {**RECIPE, "base_model": "./wild", "models": RECIPE["models"][1:]})
    race_recipes("0", *flags, "c.yml", "--choose_on", "colours")
    assert capsys.readouterr().out.count(in_memory.IN_MEMORY) == 1
    entries = json.loads((here / "results_race.json").read_text())["candidates"]
    rounds = max(loads.count(place) for place in loads)
    assert rounds == 1, "a model is loaded anew only where the base changes"
    for name in ("a", "b", "c"):
        options = ["--recipe", f"{name}.yml", "--save_path", f"m_{name}", "--output_path", f"r_{name}.json"]
        merge_and_evaluate_7b.main([*options, "--eval_recipe", "eval.yml"])
        items = json.loads((here / f"r_{name}.json").read_text())["items"]["colours"]
        kept = entries[name]["items"]["colours"]
        for at, number in enumerate(kept["number"]):
            assert kept["doc"][at] == items["doc"][number] and kept["value"][at] == items["value"][number]
            assert kept["gold"][at] == pytest.approx(items["gold"][number], rel=1e-4)


# --- resumed --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_stopped_race_resumes(here, asked, monkeypatch, stop_after):
    """Stopped in any batch: what was asked before is not asked again, and what comes out is what one go gives."""
    race(*RACE)
    whole, outcome = list(asked), results(here)["summary"]["chosen"]
    for path in (here / "results.json", here / "results_race.json"):
        path.unlink()
    asked.clear()
    stand_in, batches = racing.score_items, []

    def stops(*args):
        if len(batches) == stop_after:
            raise KeyboardInterrupt
        batches.append(1)
        return stand_in(*args)

    monkeypatch.setattr(racing, "score_items", stops)
    with pytest.raises(KeyboardInterrupt):
        race(*RACE, "--overwrite")
    assert 0 < len(asked) < len(whole)
    monkeypatch.setattr(racing, "score_items", stand_in)
    race(*RACE, "--overwrite")
    assert sorted(asked) == sorted(whole)
    again = results(here)["summary"]["chosen"]
    assert again == outcome
    asked.clear()
    race(*RACE)  # done: nothing is scored, the table is printed again
    assert asked == []


@pytest.mark.slow
def test_a_smaller_margin_scores_only_what_is_missing(here, asked):
    race("30", *RACE[1:])
    before = set(asked)
    race(*RACE, "--overwrite")
    assert before < set(asked) and len(asked) == len(set(asked))


@pytest.mark.slow
def test_a_race_of_other_models_is_not_taken(here, asked):
    race(*RACE)
    write_yaml(here / "eval.yml", {**EVAL, "num_fewshot": 1})
    (here / "results.json").unlink()
    with pytest.raises(
        DataError, match="results_race.json: weight 0.1 was scored there with other models, tasks or settings"
    ):
        race(*RACE)


# --- refused --------------------------------------------------------------------------------------


def change_task(here, name: str, **settings) -> None:
    path = here / "tasks" / f"{name}.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


LOSS = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]}
TEXT = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{thing}}"}
ROLLING |= {"metric_list": [{"metric": "word_perplexity"}]}


@pytest.mark.parametrize(
    "task, flags, line",
    [
        ({}, ["--race", "--weights", "0.3", "--choose_on", "colours"], "a race needs two candidates or more and got 1"),
        ({}, ["--race", "--weights", "0.3", "0.30"], "a race needs two candidates or more and got 1"),
        (
            {},
            ["--weights", "1", "2", "--choose_on", "colours", "--report_on", "colours"],
            "would choose the weight and report",
        ),
        (
            LOSS,
            ["--race", "--weights", "1", "2", "--choose_on", "colours", "tints"],
            "of some of colours, tints less is better",
        ),
        (
            LOSS,
            ["--weights", "1", "2", "--choose_on", "colours", "tints"],
            "so no average can choose; name tasks of one kind",
        ),
        (
            TEXT,
            ["--weights", "1", "2", "--choose_on", "colours", "--choose_by", "gold"],
            "task 'colours' is not multiple choice",
        ),
        (
            TEXT,
            ["--race", "--weights", "1", "2", "--choose_on", "colours", "--choose_by", "gold"],
            "not multiple choice",
        ),
        (
            ROLLING,
            ["--race", "--weights", "1", "2", "--choose_on", "colours"],
            "word_perplexity is no mean over items, and a race",
        ),
    ],
)
def test_refused_before_anything_is_merged(here, task, flags, line):
    change_task(here, "colours", **task)
    for dry in ([], ["--dry_run"]):
        if dry and "--race" not in flags and task:
            continue  # a sweep's dry run reads no data
        with pytest.raises(DataError, match=re.escape(line)):
            merge_and_score(*flags, *dry)
        assert left_over(here) == set()


@pytest.mark.parametrize("way", [["--race", "--weights", "1", "2"], ["--search", "cma", "--evaluations", "4"]])
def test_a_weight_that_is_no_number_is_refused(here, way):
    write_yaml(here / "recipe.yml", {**RECIPE, "models": [{"model": "./wild", "parameters": {"weight": [0.1, 0.9]}}]})
    with pytest.raises(DataError, match=r"recipe.yml: ./wild: weight is \[0.1, 0.9\]; a sweep needs one number there"):
        merge_and_score(*way, "--choose_on", "colours")


def test_samples_are_the_races_own(here):
    write_yaml(here / "eval.yml", {**EVAL, "samples": {"colours": [0]}})
    with pytest.raises(DataError, match="eval.yml: has `samples`, which a race sets itself"):
        race(*RACE)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--race"], "--race needs --weights or --weight_grid, or several recipes"),
        (["--race", "--search", "cma", "--evaluations", "3"], "--search does not go with --race"),
        (["--search", "cma", "--evaluations", "3"], "--search needs --choose_on"),
        (["--search", "cma", "--choose_on", "a"], "--search needs --evaluations"),
        (["--evaluations", "3"], "--evaluations needs --search"),
        (["--layer_groups", "3"], "--layer_groups needs --search"),
        (["--search", "cma", "--weights", "1"], "--search does not go with --weights"),
        (["--race", "--weights", "1", "2", "--keep_models"], "--race does not go with --keep_models"),
        (["--weights", "1", "--race", "-0.1"], "argument --race: '-0.1' is below 0; a margin is 0 or more"),
        (["--recipe", "a", "b", "--merge_only"], "--merge_only takes one recipe, and --recipe names 2"),
        (
            ["--recipe", "a", "b", "--search", "cma", "--evaluations", "3", "--choose_on", "x"],
            "--search takes one recipe, and --recipe names 2",
        ),
        (
            ["--recipe", "a", "--choose_on", "x"],
            "--choose_on needs --weights or --weight_grid or --search, or several recipes",
        ),
        (["--search", "anneal"], "argument --search: invalid choice: 'anneal' (choose from 'cma')"),
        (["--eval_only", "--race", "0"], "--eval_only does not go with --race"),
    ],
)
def test_usage(capsys, flags, line):
    with pytest.raises(SystemExit) as stop:
        merge_and_evaluate_7b.parse_args(flags)
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(f"error: {line}\n")


def test_dry_run_says_the_cost_and_writes_nothing(here, capsys):
    race(*RACE, "--dry_run")
    said = capsys.readouterr().out
    assert "cost    at most 10 merges and 4,000 requests (800 for each of 5) to choose" in said
    assert "GB  more, for the model that candidates are merged into; none is written" in said
    assert "writes  results_race.json" in said
    merge_and_score("--search", "cma", "--evaluations", "7", "--choose_on", "tints", "--dry_run")
    said = capsys.readouterr().out
    assert "cost    at most 7 merges and 2,240 requests (320 for each of 7) to choose" in said
    assert left_over(here) == set()


# --- a search -------------------------------------------------------------------------------------

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


@pytest.fixture
def tried_recipes(monkeypatch) -> list[str]:
    """The same for recipes, whose score is their first model's weight; returns their names."""
    names, weights = [], []

    def model_to_score(making, candidate, name, save_path):
        names.append(candidate.choice.recipe)
        weights[:] = [candidate.merge.recipe.config["models"][0]["parameters"]["weight"]]
        return candidate.model(name)

    def stand_in(recipe, model, tasks, identity, filled=None):
        document = whole_document(recipe, model, tasks, identity)
        for task in tasks.names:
            document["results"][task]["acc,none"] = weights[0]
        return document

    monkeypatch.setattr(sweep, "model_to_score", model_to_score)
    monkeypatch.setattr(scoring, "evaluate", stand_in)
    return names


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
    import yaml

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
def test_scored_items_are_those_of_a_whole_evaluation(here):
    """Batches of a race, put together, hold the very items, values and golds of results files of a plain sweep."""
    merge_and_score("--weights", "0.3", "0.9", "--choose_on", "colours", "tints")
    race(
        "0", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints", "--output_path", "raced.json", "--overwrite"
    )
    entries = json.loads((here / "raced_race.json").read_text())["candidates"]
    for weight in ("0.3", "0.9"):
        plain = json.loads((here / f"results_weight_{weight}.json").read_text())["items"]
        for task, kept in entries[weight]["items"].items():
            assert len(set(kept["number"])) == len(kept["number"])
            for at, number in enumerate(kept["number"]):
                assert kept["doc"][at] == plain[task]["doc"][number]
                assert kept["value"][at] == plain[task]["value"][number]
                assert kept["gold"][at] == pytest.approx(plain[task]["gold"][number], rel=1e-4)
    assert results(here)["summary"]["chosen"]["held_out"]


@pytest.mark.slow
def test_a_race_killed_for_real_resumes(here):
    """kill -9 after the first batches, with lm-eval itself; then the same command finishes and no batch is scored
    twice."""
    command = [
        sys.executable,
        str(ROOT / "merge_and_evaluate_7b.py"),
        "--recipe",
        "recipe.yml",
        "--eval_recipe",
        "eval.yml",
    ]
    command += ["--save_path", "merged", "--race", "0.1", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = here / "results_race.json"
    while process.poll() is None and not record.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = json.loads(record.read_text())["candidates"]
    assert not (here / "results.json").exists()
    race("0.1", "--weights", "0.3", "0.9", "--choose_on", "colours", "tints")
    after = json.loads(record.read_text())["candidates"]
    for weight, entry in before.items():
        for task, kept in entry["items"].items():
            count = len(kept["number"])
            assert {key: found[:count] for key, found in after[weight]["items"][task].items()} == kept
    assert results(here)["summary"]["weights"] in ([0.3], [0.9])


@pytest.mark.slow
def test_a_search_through_lm_eval(here):
    merge_and_score(*SEARCH, "--evaluations", "3", "--choose_by", "gold")
    chosen = results(here)["summary"]["chosen"]
    assert len(chosen["candidates"]) == 3 and chosen["by"] == "gold"
    values = [record["value"] for record in chosen["candidates"]]
    assert chosen["weights"] == chosen["candidates"][int(np.argmax(values))]["weights"]
