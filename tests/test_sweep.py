"""Sweeps over the weight: what is tried, kept, chosen and reported, and that an interrupted one goes on."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from long_tasks import whole_document
from recipes_and_models import RECIPE, left_over, merge_and_score, write_yaml

import merge_and_evaluate_7b
from common.errors import DataError
from merge_and_evaluate import in_memory, scoring
from merge_and_evaluate.choices import weight_choices
from merge_and_evaluate.recipes import read_recipe, with_weights

PEAKS = {"colours": 0.9, "shades": 0.3, "tints": 0.6}  # the weight at which the stand-in scores best
ALL_TASKS = {"include_path": "./tasks", "tasks": list(PEAKS), "batch_size": 4}


@pytest.fixture(autouse=True)
def three_tasks(here) -> None:
    """eval.yml with a task more than usual: one to choose on, two to report."""
    write_yaml(here / "eval.yml", ALL_TASKS)


def merged_by(model: Path) -> dict:
    """The recipe that a merged model records."""
    return yaml.safe_load(json.loads((model / "merge_report.json").read_text())["recipe"])


@pytest.fixture
def asked_models(monkeypatch) -> list[str]:
    """A stand-in for lm-eval, which knows the weight from the model's directory; returns the list of models it was
    asked about."""
    models = []

    def stand_in(recipe, model, tasks, identity, filled=None):
        models.append(model)
        config = merged_by(Path(model))
        weight = config["models"][0]["parameters"]["weight"]
        document = whole_document(recipe, model, tasks, identity)
        for name, scores in document["results"].items():
            scores["acc,none"] = 0.9 - abs(weight - PEAKS[name])
        return document

    monkeypatch.setattr(scoring, "evaluate", stand_in)
    monkeypatch.setattr(in_memory, "written_reason", lambda *_: "the stand-in reads directories")
    return models


# --- weights --------------------------------------------------------------------------------------


def test_weight_choices():
    assert weight_choices([0.6, 0.9, 0.6], None) == [(0.6,), (0.9,)]
    assert weight_choices(None, [[1, 2], [3, 4]]) == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert weight_choices(None, None) == []


def test_weights_go_where_the_recipe_has_them(here):
    recipe = read_recipe("recipe.yml")
    assert [m["parameters"]["weight"] for m in with_weights(recipe, (0.5,)).config["models"]] == [0.5, 0.5]
    assert [m["parameters"]["weight"] for m in with_weights(recipe, (0.5, 2.0)).config["models"]] == [0.5, 2.0]
    assert recipe.config["models"][0]["parameters"]["weight"] == 1.2
    with pytest.raises(DataError, match="recipe.yml: 3 grids of weights for 2 models with a weight"):
        with_weights(recipe, (1.0, 2.0, 3.0))


def test_a_weight_for_all_models_is_swept_too(here):
    write_yaml(
        here / "recipe.yml",
        {
            "merge_method": "task_arithmetic",
            "base_model": "./base",
            "parameters": {"weight": 1.0},
            "models": [{"model": "./wild"}, {"model": "./west"}],
        },
    )
    assert with_weights(read_recipe("recipe.yml"), (0.5,)).config["parameters"] == {"weight": 0.5}


def test_a_gradient_is_not_swept(here):
    models = [{"model": "./wild", "parameters": {"weight": [0.1, 0.9]}}]
    write_yaml(here / "recipe.yml", {**RECIPE, "models": models})
    with pytest.raises(DataError, match=r"recipe.yml: ./wild: weight is \[0.1, 0.9\]; a sweep needs one number there"):
        with_weights(read_recipe("recipe.yml"), (0.5,))


def test_weights_that_would_cancel_are_not_swept(here):
    """ties divides by the sum of the weights: equal ones change nothing, so its lambda is swept, or nothing."""
    write_yaml(here / "recipe.yml", {**RECIPE, "merge_method": "ties", "parameters": {"lambda": 1.0}})
    changed = with_weights(read_recipe("recipe.yml"), (0.5,)).config
    assert changed["parameters"]["lambda"] == 0.5 and changed["models"] == RECIPE["models"]
    write_yaml(here / "recipe.yml", {**RECIPE, "merge_method": "ties"})
    with pytest.raises(DataError, match="divides by the sum of the weights, so equal weights cancel; set `normalize"):
        merge_and_score("--weights", "0.5", "1")


def test_a_recipe_without_weights_is_refused(here):
    write_yaml(
        here / "recipe.yml",
        {"merge_method": "model_stock", "base_model": "./base", "models": [{"model": "./wild"}, {"model": "./west"}]},
    )
    with pytest.raises(DataError, match="recipe.yml: no model has a `weight` under its `parameters`"):
        merge_and_score("--weights", "1")
    assert left_over(here) == set()


# --- a whole sweep --------------------------------------------------------------------------------


def test_every_weight_is_scored_and_the_best_is_kept(here, asked_models, capsys):
    merge_and_score("--weights", "0.3", "0.6", "0.9", "--name", "TA")
    assert asked_models == ["merged_weight_0.3", "merged_weight_0.6", "merged_weight_0.9"]
    assert left_over(here) == {
        "merged",
        "results.json",
        "results_sweep.csv",
        "results_sweep.png",
        "results_weight_0.3.json",
        "results_weight_0.6.json",
        "results_weight_0.9.json",
    }
    config = merged_by(here / "merged")
    assert [model["parameters"]["weight"] for model in config["models"]] == [0.6, 0.6]
    summary = json.loads((here / "results.json").read_text())["summary"]
    assert summary["name"] == "TA" and summary["weights"] == [0.6]
    assert summary["chosen"]["on"] == list(PEAKS) and summary["chosen"]["held_out"] is False
    assert "which flatters it" in capsys.readouterr().out


def test_scores_that_a_merge_got_before_are_taken(here, asked_models, capsys):
    """A merge that a sweep scored, merged on its own; and a winner that is reported twice: said, and not scored
    again."""
    merge_and_score("--weights", "0.3", "0.6", "--output_path", "sweep.json", "--save_path", "swept")
    models = [{**model, "parameters": {"weight": 0.6}} for model in RECIPE["models"]]
    write_yaml(here / "alone.yml", {**RECIPE, "models": models})
    count = len(asked_models)
    flags = ["--eval_recipe", "eval.yml", "--save_path", "merged", "--recipe", "alone.yml"]
    merge_and_evaluate_7b.main([*flags, "--output_path", "alone.json"])
    assert len(asked_models) == count
    said = "merged was scored by this recipe before: its scores are taken from sweep"
    assert said in capsys.readouterr().out
    summary = json.loads((here / "alone.json").read_text())["summary"]
    assert summary["name"] == "alone" and not summary.keys() & {"chosen", "weights"}
    merge_and_evaluate_7b.main([*flags, "--output_path", "alone.json", "--overwrite"])
    assert len(asked_models) == count + 1, "--overwrite scores it again"


def test_a_limit_is_in_the_csv(here, asked_models):
    merge_and_score("--weights", "0.3", "0.6", "--limit", "2")
    with open("results_sweep.csv") as file:
        assert [line["limit"] for line in csv.DictReader(file)] == ["2", "2"]


def test_table_csv_and_files_agree(here, asked_models, capsys):
    merge_and_score("--weights", "0.3", "0.6")
    printed = capsys.readouterr().out
    with open("results_sweep.csv") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        summary = json.loads((here / f"results_weight_{line['weight']}.json").read_text())["summary"]
        assert float(line["average"]) == summary["average"]
        assert all(float(line[task]) == summary["tasks"][task]["value"] for task in PEAKS)
        assert all(float(line[f"{task}_stderr"]) == 0.01 for task in PEAKS)
        assert f"\n| {line['weight']} |" in printed
    assert [line["chosen"] for line in lines] == ["0", "1"]
    assert (here / "results_sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_keep_models_keeps_them(here, asked_models):
    merge_and_score("--weights", "0.3", "0.6", "--keep_models")
    assert {"merged", "merged_weight_0.3"} <= left_over(here)


@pytest.mark.slow
def test_a_grid_has_a_weight_per_model(here, asked_models):
    merge_and_score("--weight_grid", "0.3", "0.6", "--weight_grid", "1", "2")
    labels = ["0.3_1", "0.3_2", "0.6_1", "0.6_2"]
    assert asked_models == [f"merged_weights_{label}" for label in labels]
    config = merged_by(here / "merged")
    assert [model["parameters"]["weight"] for model in config["models"]] == [0.6, 1.0]  # the first of two equal ones
    assert (here / "results_sweep.csv").read_text().startswith("weight_1,weight_2,colours,")


def test_chosen_on_some_tasks_reported_on_others(here, asked_models):
    """colours alone says 0.9, all together 0.6; the scores that are reported never chose."""
    merge_and_score("--weights", "0.3", "0.6", "0.9", "--choose_on", "colours")
    document = json.loads((here / "results.json").read_text())
    assert document["summary"]["weights"] == [0.9] and list(document["summary"]["tasks"]) == ["shades", "tints"]
    chosen = document["summary"]["chosen"]
    assert chosen["on"] == ["colours"] and chosen["held_out"] is True
    assert [tried["average"] for tried in chosen["candidates"]] == pytest.approx([0.3, 0.6, 0.9])
    assert document["provenance"]["tasks"] == ["shades", "tints"] and document["provenance"]["model"] == "merged"


def test_report_on_names_what_is_reported(here, asked_models):
    merge_and_score("--weights", "0.3", "--choose_on", "colours", "--report_on", "tints")
    assert list(json.loads((here / "results.json").read_text())["summary"]["tasks"]) == ["tints"]


def test_no_task_both_chooses_and_reports(here, asked_models):
    for flags, line in [
        (
            ["--choose_on", "colours", "--report_on", "col*"],
            "task 'colours' would choose the weight and report it; name what to report with --report_on",
        ),
        (["--choose_on", *PEAKS], "all its tasks are in --choose_on; name others with --report_on"),
    ]:
        with pytest.raises(DataError) as error:
            merge_and_score("--weights", "0.3", *flags)
        assert str(error.value) == f"eval.yml: {line}" and left_over(here) == set()


def test_a_group_is_opened_to_see_what_is_in_it(here, asked_models):
    group = {"group": "both", "task": ["colours", {"task": "shades", "num_fewshot": 0}]}
    write_yaml(here / "tasks" / "both.yaml", group)
    with pytest.raises(DataError, match="task 'shades' would choose the weight and report it"):
        merge_and_score("--weights", "0.3", "--choose_on", "both", "--report_on", "shades")


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(here, asked_models, monkeypatch):
    """Stopped while the second model is scored: nothing is scored twice, and what comes out is the same."""
    stand_in = scoring.evaluate

    def stops(recipe, model, tasks, identity, filled=None):
        if model == "merged_weight_0.6":
            raise KeyboardInterrupt
        return stand_in(recipe, model, tasks, identity)

    monkeypatch.setattr(scoring, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        merge_and_score("--weights", "0.3", "0.6", "0.9")
    assert left_over(here) == {"merged_weight_0.3", "merged_weight_0.6", "results_weight_0.3.json"}
    monkeypatch.setattr(scoring, "evaluate", stand_in)
    merge_and_score("--weights", "0.3", "0.6", "0.9")
    assert asked_models == ["merged_weight_0.3", "merged_weight_0.6", "merged_weight_0.9"]
    assert "merged" in left_over(here) and not any(name.startswith("merged_") for name in left_over(here))

    merge_and_score("--weights", "0.3", "0.6", "0.9")  # done: nothing is merged or scored again, the table is printed
    assert len(asked_models) == 3
    with pytest.raises(DataError, match="results.json: already there"):
        merge_and_score("--weights", "0.3", "0.6", "0.9", "1.2")
    merge_and_score("--weights", "0.3", "0.6", "0.9", "1.2", "--overwrite")
    assert asked_models[3:] == ["merged_weight_1.2"]


@pytest.mark.slow
def test_a_model_that_is_gone_is_merged_again(here, asked_models):
    merge_and_score("--weights", "0.3", "0.6")
    shutil.rmtree(here / "merged")
    (here / "results.json").unlink()
    merge_and_score("--weights", "0.3", "0.6")
    assert len(asked_models) == 2 and (here / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["model", "eval recipe", "task", "data"])
def test_scores_of_something_else_are_not_taken(here, asked_models, change):
    """Other weights in the model's files, another eval recipe, task file or question: the old scores do not count."""
    merge_and_score("--weights", "0.3")
    if change == "model":
        folder = (here / "wild").resolve()
        (here / "wild").unlink()
        shutil.copytree(folder, here / "wild")
        shard = next((here / "wild").glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif change == "eval recipe":
        write_yaml(here / "eval.yml", {**ALL_TASKS, "limit": 5})
    else:
        path = here / "tasks" / ("colours.yaml" if change == "task" else "colours.jsonl")
        path.write_text(path.read_text().replace("the", "that") + "\n")
    (here / "results.json").unlink()
    with pytest.raises(DataError, match="results_weight_0.3.json: already there; give --overwrite to replace it"):
        merge_and_score("--weights", "0.3")
    merge_and_score("--weights", "0.3", "--overwrite")
    assert len(asked_models) == 2


@pytest.mark.slow
def test_killed_for_real_and_run_again(here):
    """kill -9 once the first scores are there, with lm-eval itself; then the same command finishes."""
    command = [
        sys.executable,
        str(ROOT / "merge_and_evaluate_7b.py"),
        "--recipe",
        "recipe.yml",
        "--eval_recipe",
        "eval.yml",
        "--save_path",
        "merged",
        "--weights",
        "0.3",
        "0.9",
        "--choose_on",
        "colours",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = here / "results_weight_0.3.json"
    while process.poll() is None and not first.is_file():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (here / "results.json").exists()
    before = first.stat().st_mtime_ns
    merge_and_score("--weights", "0.3", "0.9", "--choose_on", "colours")
    assert first.stat().st_mtime_ns == before
    summary = json.loads((here / "results.json").read_text())["summary"]
    averages = [tried["average"] for tried in summary["chosen"]["candidates"]]
    assert summary["weights"] == [[0.3, 0.9][int(np.argmax(averages))]]
    assert not any(name.endswith(".part") or "merged_" in name for name in left_over(here))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--choose_on", "colours", "--report_on", "shades")])
def test_another_model_in_the_winners_place_is_noticed(here, flags, capsys):
    weights = ("--weights", "0.5", "1", *flags)
    merge_and_score(*weights)
    merge_and_score(*weights)
    assert "results.json is from before" in capsys.readouterr().out
    winner = json.loads((here / "results.json").read_text())["summary"]["weights"][0]
    write_yaml(here / "other.yml", yaml.safe_load(yaml.safe_dump(RECIPE).replace("1.2", "3.0")))
    other = ["--recipe", "other.yml", "--save_path", "merged", "--merge_only", "--overwrite"]
    merge_and_evaluate_7b.main(other)
    with pytest.raises(DataError, match="merged.*--overwrite"):
        merge_and_score(*weights)
    merge_and_score(*weights, "--overwrite")
    recipe = json.loads((here / "merged" / "merge_report.json").read_text())["recipe"]
    assert [m["parameters"]["weight"] for m in yaml.safe_load(recipe)["models"]] == [winner, winner]
