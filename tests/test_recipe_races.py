"""Races and sweeps over recipes: several `--recipe`, with the weights they have or with each of `--weights`."""

import csv
import json
import re

import pytest
from long_tasks import results, stopping_after, whole_document
from recipes_and_models import RECIPE, left_over, write_yaml

import merge_and_evaluate_7b
from common.errors import DataError
from common.shards.hashing import text_hash
from merge_and_evaluate import in_memory, racing, scoring, sweep

pytestmark = pytest.mark.usefixtures("long_tasks")


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


@pytest.fixture
def tried_recipes(monkeypatch) -> list[str]:
    """A stand-in for merging and scoring: a recipe's score is its first model's weight; returns their names."""
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
    assert "numbers of items differ" not in said
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
    stand_in = racing.score_items
    monkeypatch.setattr(racing, "score_items", stopping_after(stop_after, stand_in))
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


@pytest.mark.slow
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
    said = capsys.readouterr().out
    assert said.count(in_memory.IN_MEMORY) == 1
    order = re.findall(r"^round \d+ of \d+, recipe (\w):", said, re.M)
    bases = ["wild" if name == "c" else "base" for name in order]
    changes = sum(one != other for one, other in zip([None, *bases], bases, strict=False))
    assert len(loads) == changes > 1, "a model is loaded anew only where the base changes"
    entries = json.loads((here / "results_race.json").read_text())["candidates"]
    for name in ("a", "b", "c"):
        options = ["--recipe", f"{name}.yml", "--save_path", f"m_{name}", "--output_path", f"r_{name}.json"]
        merge_and_evaluate_7b.main([*options, "--eval_recipe", "eval.yml"])
        items = json.loads((here / f"r_{name}.json").read_text())["items"]["colours"]
        kept = entries[name]["items"]["colours"]
        assert entries[name]["documents"]["colours"] == text_hash(" ".join(items["doc"]))
        for at, number in enumerate(kept["number"]):
            assert kept["value"][at] == items["value"][number]
            assert kept["gold"][at] == pytest.approx(items["gold"][number], rel=1e-4)
