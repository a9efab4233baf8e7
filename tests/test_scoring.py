"""How a model is scored: settings of groups, flags, dtype, what is said, what is refused before the merge, what is
reused.
"""

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import recipes_and_models
import yaml
from recipes_and_models import EVAL, RECIPE, write_yaml

import merge_and_evaluate_7b as script
from common.errors import DataError
from merge_and_evaluate import results, scoring
from merge_and_evaluate.eval_settings import members, part_of_recipe
from merge_and_evaluate.recipes import read_recipe, with_models


def score(*flags: str) -> dict:
    """results.json of `west`, scored by eval.yml."""
    recipes_and_models.score("west", *flags)
    return json.loads(Path("results.json").read_text())


def dry_run(*flags: str) -> None:
    script.main(["--recipe", "recipe.yml", "--eval_recipe", "eval.yml", "--save_path", "merged", "--dry_run", *flags])


# --- what groups say about their members ----------------------------------------------------------


def index_of(**entries) -> dict:
    """lm-eval's index of these tasks and groups, as far as it is looked at."""

    def entry(name, config):
        kind = "GROUP" if "task" in config else "TAG" if "tags" in config else "TASK"
        return SimpleNamespace(
            name=name, kind=SimpleNamespace(name=kind), yaml_path=None, cfg=config, tags=config.get("tags", ())
        )

    return {name: entry(name, config) for name, config in entries.items()}


INDEX = index_of(
    a={},
    b={"num_fewshot": 3},
    c={},
    d={},
    tag={"tags": {"c", "d"}},
    inner={"group": "inner", "task": ["tag", {"task": "b", "num_fewshot": 9}], "num_fewshot": 1},
    outer={
        "group": "outer",
        "task": [{"task": "a", "num_fewshot": 25, "description": "x"}, {"group": "inner", "num_fewshot": 5}],
    },
)


def test_settings_are_handed_down_as_lm_eval_does():
    """Where a group is named wins over what it says itself; a member's own wins over both."""
    assert members(INDEX, INDEX["outer"].cfg, {}) == [
        ("a", {"num_fewshot": 25, "description": "x"}),
        ("inner", {"num_fewshot": 5}),
        ("tag", {"num_fewshot": 5}),
        ("c", {"num_fewshot": 5}),
        ("d", {"num_fewshot": 5}),
        ("b", {"num_fewshot": 9}),
    ]


def test_a_member_named_alone_keeps_them():
    part = lambda *names: part_of_recipe(INDEX, ["outer"], list(names))  # noqa: E731
    assert part("outer") == []
    assert part("a", "b") == [{"task": "a", "num_fewshot": 25, "description": "x"}, {"task": "b", "num_fewshot": 9}]
    assert part("inner") == [{"group": "inner", "num_fewshot": 5}]
    assert part("tag") == [{"task": "c", "num_fewshot": 5}, {"task": "d", "num_fewshot": 5}]
    assert part_of_recipe(INDEX, ["a", "b"], ["a"]) == []


@pytest.mark.slow
def test_lm_eval_builds_the_part_with_them(here):
    """A group in the recipe's folder gives colours 2 shots; named alone, in a sweep's dry run and for real, it has
    2."""
    group = {"group": "both", "task": [{"task": "colours", "num_fewshot": 2, "fewshot_split": "test"}, "shades"]}
    write_yaml(here / "tasks" / "both.yaml", group)
    write_yaml(here / "eval.yml", {**EVAL, "tasks": ["both"], "log_samples": True})
    flags = ["--recipe", "recipe.yml", "--eval_recipe", "eval.yml", "--save_path", "merged", "--weights", "1"]
    script.main([*flags, "--choose_on", "shades", "--report_on", "colours"])
    document = json.loads((here / "results.json").read_text())
    assert document["summary"]["tasks"]["colours"]["num_fewshot"] == 2
    lines = [json.loads(line) for line in (here / "results_samples_colours.jsonl").read_text().splitlines()]
    assert {line["arguments"][0][0].count("the ") for line in lines} == {3}
    chose = json.loads((here / "results_weight_1.json").read_text())
    assert chose["summary"]["tasks"]["shades"]["num_fewshot"] == 0


def test_what_is_left_of_a_group_is_reported(here, capsys):
    """--choose_on alone: the recipe's other tasks report, also where it names them by one group."""
    write_yaml(
        here / "tasks" / "both.yaml", {"group": "both", "task": ["colours", {"task": "shades", "num_fewshot": 0}]}
    )
    write_yaml(here / "eval.yml", {**EVAL, "tasks": ["both"]})
    dry_run("--weights", "0.5", "1", "--choose_on", "colours")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-8:] == [
        "score   eval.yml: both",
        "choose  on colours 0-shot",
        "report  on shades 0-shot",
        "writes  results_weight_0.5.json",
        "writes  results_weight_1.json",
        "writes  results_sweep.csv",
        "writes  results_sweep.png",
        "writes  results.json",
    ]


# --- flags and dtype ------------------------------------------------------------------------------


def test_float16_on_a_cpu_is_scored_in_float32_and_says_so(here, capsys):
    document = score("--device", "cpu")
    assert document["config"]["model_dtype"] == "torch.float32"
    assert document["provenance"]["model_args"] == {"dtype": "float32"}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring west"))
    assert line == (
        "scoring west: colours 6 items 0-shot, shades 6 items 0-shot; float32 (stored as float16, which is slow on a "
        "CPU) on cpu, batch size 4; 72 requests"
    )


@pytest.mark.slow
def test_flags_win_over_the_recipe(here, capsys):
    write_yaml(here / "eval.yml", {**EVAL, "model_args": "dtype=float32,max_length=32"})
    document = score("--dtype", "float16", "--limit", "2", "--model_args", "max_length=16")
    assert document["config"]["model_dtype"] == "torch.float16"
    assert document["provenance"]["model_args"] == {"dtype": "float16", "max_length": 16}
    assert document["provenance"]["limit"] == 2 and document["summary"]["tasks"]["colours"]["samples"] == 2
    printed = capsys.readouterr().out
    assert "| west (limit 2) | metric | shots | items | score |" in printed and "; limit 2; 24 requests" in printed


@pytest.mark.slow
def test_a_path_is_a_path_however_it_is_spelled(here, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(here))
    for path, name in (("west", "west"), ("./west", "west"), ("west/", "west"), ("~/west", "west")):
        script.main(["--eval_only", f"--save_path={path}", "--eval_recipe=~/eval.yml", "--output_path=~/results.json"])
        assert json.loads((here / "results.json").read_text())["summary"]["name"] == name
    assert capsys.readouterr().out.count("was scored by this recipe before") == 3
    assert not (here / "~").exists()


@pytest.mark.slow
def test_lm_eval_speaks_to_a_file(here, capsys):
    """Its messages are in results.log; stderr has the bar of the requests and no other."""
    score()
    assert "lm_eval.evaluator: Running loglikelihood requests" in (here / "results.log").read_text()
    err = capsys.readouterr().err
    assert "Running loglikelihood requests" in err and "WARNING" not in err
    assert {line.split(":")[0] for line in err.replace("\r", "\n").splitlines() if "%|" in line} == {
        "Running loglikelihood requests"
    }


# --- scores from before ---------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_of_the_same_content_are_taken_and_it_is_said(here, capsys, monkeypatch):
    score("--name", "first")
    capsys.readouterr()
    shutil.copytree((here / "west").resolve(), here / "copy_of_west")
    monkeypatch.setattr(scoring, "evaluate", lambda *_: pytest.fail("scored again"))
    flags = ["--eval_only", "--save_path", "copy_of_west", "--eval_recipe", "eval.yml", "--output_path", "again.json"]
    script.main([*flags, "--name", "second"])
    assert (
        "copy_of_west was scored by this recipe before: its scores are taken from results.json"
        in capsys.readouterr().out
    )
    again, first = (json.loads((here / name).read_text()) for name in ("again.json", "results.json"))
    assert again["items"] == first["items"] and again["summary"]["name"] == "second"
    with pytest.raises(DataError, match="again.json: already there"):
        script.main([*flags, "--limit", "3"])


# --- other paths ----------------------------------------------------------------------------------


def test_with_models_replaces_paths_in_order(here):
    recipe = read_recipe("recipe.yml")
    changed = with_models(recipe, "./west", ["base/", "wild"]).config
    assert changed["base_model"] == "./west" and [m["model"] for m in changed["models"]] == ["./base", "./wild"]
    assert [m["parameters"] for m in changed["models"]] == [m["parameters"] for m in RECIPE["models"]]
    assert with_models(recipe, None, None) is recipe
    for models, line in [
        (["./base"], "recipe.yml: --models names 1 and the recipe has 2 (./wild, ./west); name as many, in its order"),
        (["./wild", "./wild"], "recipe.yml: merge_method task_arithmetic: Duplicate merge inputs; fix the recipe"),
    ]:
        with pytest.raises(DataError) as error:
            with_models(recipe, None, models)
        assert str(error.value) == line


def test_flags_for_other_paths(here, capsys):
    dry_run("--base_model", "west", "--models", "base", "wild")
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("reads")] == [
        "./west",
        "./base",
        "./wild",
    ]


# --- refused before the merge ---------------------------------------------------------------------


def test_what_cannot_run_is_refused_by_the_dry_run(here):
    for recipe, line in [
        ({**EVAL, "model": "vllm"}, "eval.yml: model 'vllm' needs the package vllm, which is not installed"),
        ({**EVAL, "model": "hff"}, "eval.yml: lm-eval does not know model 'hff'"),
        (
            {**EVAL, "apply_chat_template": True},
            "eval.yml: apply_chat_template is set, but ./base, whose tokenizer is used, has no chat template; leave "
            "apply_chat_template out, or copy a chat_template.jinja there",
        ),
    ]:
        write_yaml(here / "eval.yml", recipe)
        with pytest.raises(DataError) as error:
            dry_run()
        assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_the_model_with_a_template_is_named(here):
    shutil.copytree((here / "wild").resolve(), here / "chatty")
    (here / "chatty" / "chat_template.jinja").write_text("{{ messages }}")
    write_yaml(here / "recipe.yml", {**RECIPE, "models": [{"model": "./chatty", "parameters": {"weight": 1}}]})
    write_yaml(here / "eval.yml", {**EVAL, "apply_chat_template": True})
    with pytest.raises(
        DataError, match="./chatty has one: copy its chat_template.jinja there, or set `chat_template: auto`"
    ):
        dry_run()
    write_yaml(
        here / "recipe.yml",
        {**RECIPE, "base_model": "./chatty", "models": [{"model": "./west", "parameters": {"weight": 1}}]},
    )
    dry_run()


def test_a_missing_data_file_is_refused(here):
    (here / "tasks" / "colours.jsonl").unlink()
    with pytest.raises(DataError, match=r"eval.yml: task 'colours' reads .*colours.jsonl, which is not there; make it"):
        dry_run()


def test_a_task_whose_package_is_missing_is_refused(here):
    task = json.loads((here / "tasks" / "shades.yaml").read_text())
    (here / "tasks" / "code.py").write_text("import a_package_that_nobody_has\n\n\ndef answer(doc):\n    return 0\n")
    text = yaml.safe_dump(task | {"doc_to_target": "FUNCTION"}).replace("FUNCTION", "!function code.answer")
    (here / "tasks" / "shades.yaml").write_text(text)
    with pytest.raises(
        DataError,
        match="eval.yml: task 'shades' needs a package that is not installed: No module named .*; install it "
        r".for tasks of lm-eval's own leaderboard: pip install 'lm_eval\[math,ifeval\]'\)$",
    ):
        dry_run()


@pytest.mark.slow
def test_a_score_is_not_lost_for_a_version(here, monkeypatch):
    """Without mergekit, which what streams does not need; the others' versions are recorded all the same."""
    real = results.version

    def version(name):
        if name == "mergekit":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(results, "version", version)
    found = score("--device", "cpu")["provenance"]["versions"]
    assert found["mergekit"] is None and found["lm_eval"] == real("lm_eval")
